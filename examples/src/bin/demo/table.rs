//! The live table: what each member receives from each other member.

use std::{
    collections::HashMap,
    io::{IsTerminal as _, Write as _},
    time::{Duration, Instant},
};

use antiphon_call_sdk::{TrackSid, TrackSummary};
use comfy_table::{CellAlignment, Table, presets::UTF8_FULL_CONDENSED};

use crate::member::Member;

/// How often a table is printed where nothing can be redrawn.
const PRINT_EVERY: Duration = Duration::from_secs(3);

/// Redraws in place on a terminal; prints now and then elsewhere.
pub(crate) struct LiveTable {
    terminal: bool,
    /// How many lines of the last drawing the next one replaces.
    lines: usize,
    last: Option<Instant>,
    /// Bytes per receiver and track at the last drawing: a bitrate is what came since.
    bytes: HashMap<(&'static str, TrackSid), u64>,
}

impl LiveTable {
    pub(crate) fn new() -> Self {
        Self { terminal: std::io::stdout().is_terminal(), lines: 0, last: None, bytes: HashMap::new() }
    }

    /// Leaves what is drawn where it is; the next table comes below.
    pub(crate) fn keep(&mut self) {
        self.lines = 0;
    }

    pub(crate) fn draw(&mut self, members: &[Member]) {
        let now = Instant::now();
        if !self.terminal && self.last.is_some_and(|at| now - at < PRINT_EVERY) {
            return;
        }
        let since = self.last.replace(now).map(|at| now - at);
        let text = self.render(members, since);
        let mut out = std::io::stdout().lock();
        if self.terminal && self.lines > 0 {
            // Up over the old table, and clear from there.
            let _ = write!(out, "\x1b[{}A\x1b[J", self.lines);
        }
        self.lines = text.lines().count();
        // Nobody may be reading: the demo's verdict does not depend on it.
        let _ = writeln!(out, "{text}").and_then(|()| out.flush());
    }

    fn render(&mut self, members: &[Member], since: Option<Duration>) -> String {
        let mut table = Table::new();
        table.load_style(UTF8_FULL_CONDENSED);
        table.set_header([
            "receiver",
            "sender",
            "track",
            "received",
            "decrypted",
            "failed",
            "no key yet",
            "key",
            "kbit/s",
            "first frame",
        ]);
        for member in members {
            let mut tracks = member.tracks();
            tracks.sort_by_key(|track| {
                (track.from.member.key(), track.from.track.codec.is_some_and(|c| c.is_audio()))
            });
            for track in tracks {
                let bytes = track.stats.bytes;
                let before = self.bytes.insert((member.name, track.from.track.sid.clone()), bytes);
                let rate =
                    since.zip(before).map(|(time, before)| kilobits(bytes.saturating_sub(before), time));
                table.add_row(row(member.name, &track, rate));
            }
        }
        for column in 3..10 {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        table.to_string()
    }
}

fn row(receiver: &str, track: &TrackSummary, rate: Option<f64>) -> [String; 10] {
    let none = || "–".to_owned();
    let (from, stats) = (&track.from, &track.stats);
    let sender = from.member.user_id.localpart().split('-').next().unwrap_or_default().to_owned();
    [
        receiver.to_owned(),
        sender,
        from.track.codec.map_or_else(none, |codec| format!("{codec:?}")),
        stats.received.to_string(),
        stats.opened.to_string(),
        stats.refused.to_string(),
        stats.missing_key.to_string(),
        stats.key_index.map_or_else(none, |i| i.0.to_string()),
        rate.map_or_else(none, |r| format!("{r:.0}")),
        stats.first_opened.map_or_else(none, |d| format!("{} ms", d.as_millis())),
    ]
}

fn kilobits(bytes: u64, time: Duration) -> f64 {
    f64::from(u32::try_from(bytes).unwrap_or(u32::MAX)) * 8.0 / 1000.0 / time.as_secs_f64().max(0.001)
}
