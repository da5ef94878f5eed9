//! The transport entries of a membership (MSC4195).

use serde_json::Value;

use super::Ignored;
use crate::transport::{LiveKitFocus, MeshSession, mesh};

/// Most entries of a list that are read, and most foci of a member. Deployed clients write one.
const MAX_ENTRIES: usize = 16;

/// Longest mesh session, in bytes.
const MAX_SESSION: usize = 255;

/// What a list of transports names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Published {
    /// The usable LiveKit foci in their order, one entry per deployment.
    pub(super) foci: Vec<LiveKitFocus>,
    /// The session of the first usable mesh entry.
    pub(super) mesh: Option<MeshSession>,
    /// Whether an entry has the type of merged MSC4195, `m.livekit`.
    pub(super) names_merged_type: bool,
}

impl Published {
    pub(super) fn merged_with(mut self, other: Self) -> Self {
        self.names_merged_type |= other.names_merged_type;
        for focus in other.foci {
            add(&mut self.foci, focus);
        }
        self.foci.truncate(MAX_ENTRIES);
        self.mesh = self.mesh.or(other.mesh);
        self
    }
}

/// Reads `foci_preferred`, `rtc_transports` or `transports.published`. Entries of unknown types and entries without a
/// usable URL are skipped.
///
/// # Errors
/// If it is not a list, or an entry has no type.
pub(super) fn published(list: &Value, name: &'static str) -> Result<Published, Ignored> {
    let list = list.as_array().ok_or(Ignored::Malformed(name))?;
    let mut published = Published::default();
    for entry in list.iter().take(MAX_ENTRIES) {
        let kind = entry.get("type").and_then(Value::as_str).ok_or(Ignored::Malformed(name))?;
        published.names_merged_type |= kind == "m.livekit";
        if let Some(focus) = livekit_focus(entry) {
            add(&mut published.foci, focus);
        }
        if published.mesh.is_none() && kind == mesh::TRANSPORT_TYPE {
            published.mesh = mesh_session(entry);
        }
    }
    Ok(published)
}

/// Reads one transport entry: type `livekit` or `m.livekit`, with `livekit_service_url`, `url` or both. `None` for
/// another type, or if neither URL is usable.
#[must_use]
fn livekit_focus(entry: &Value) -> Option<LiveKitFocus> {
    if !is_livekit(entry.get("type")?.as_str()?) {
        return None;
    }
    let text = |name| entry.get(name).and_then(Value::as_str);
    let service = text("livekit_service_url").and_then(|url| url.parse().ok());
    let sfu = text("url").and_then(|url| url.parse().ok());
    (service.is_some() || sfu.is_some()).then_some(LiveKitFocus { service, sfu })
}

/// Reads a mesh entry (`docs/mesh.md`).
fn mesh_session(entry: &Value) -> Option<MeshSession> {
    let session = entry.get("session_id")?.as_str()?;
    (1..=MAX_SESSION).contains(&session.len()).then(|| MeshSession(session.to_owned()))
}

pub(super) fn is_livekit(kind: &str) -> bool {
    matches!(kind, "livekit" | "m.livekit")
}

/// Adds a focus, merged with every known entry of the same deployment.
fn add(foci: &mut Vec<LiveKitFocus>, mut focus: LiveKitFocus) {
    let mut place = foci.len();
    // A merged entry has both URLs and may be the same as a further one.
    while let Some(index) = foci.iter().position(|known| known.is_same_as(&focus)) {
        let known = foci.remove(index);
        place = place.min(index);
        focus = LiveKitFocus { service: known.service.or(focus.service), sfu: known.sfu.or(focus.sfu) };
    }
    foci.insert(place.min(foci.len()), focus);
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn focus(service: Option<&str>, sfu: Option<&str>) -> LiveKitFocus {
        LiveKitFocus {
            service: service.map(|url| url.parse().unwrap()),
            sfu: sfu.map(|url| url.parse().unwrap()),
        }
    }

    // Scenario 25.
    #[test]
    fn entry_with_either_url_is_a_focus() {
        for (entry, expected) in [
            (
                json!({"type": "m.livekit", "url": "wss://sfu.example"}),
                focus(None, Some("wss://sfu.example")),
            ),
            (
                json!({"type": "livekit", "livekit_service_url": "https://jwt.example/a/"}),
                focus(Some("https://jwt.example/a"), None),
            ),
            (
                json!({"type": "livekit", "livekit_service_url": "https://jwt.example", "url": "wss://sfu.example/"}),
                focus(Some("https://jwt.example"), Some("wss://sfu.example")),
            ),
            (
                json!({"type": "livekit", "livekit_service_url": "https://jwt.example", "livekit_alias": "!r:example.org"}),
                focus(Some("https://jwt.example"), None),
            ),
            (
                json!({"type": "m.livekit", "livekit_service_url": "https://jwt.example", "url": 1}),
                focus(Some("https://jwt.example"), None),
            ),
        ] {
            assert_eq!(livekit_focus(&entry), Some(expected), "{entry}");
        }
    }

    #[test]
    fn entry_without_usable_url_or_type_is_skipped() {
        for entry in [
            json!({"type": "livekit"}),
            json!({"type": "livekit", "livekit_service_url": "file:///etc"}),
            json!({"type": "m.livekit", "url": "nonsense"}),
            json!({"type": "other", "livekit_service_url": "https://jwt.example"}),
            json!({"livekit_service_url": "https://jwt.example"}),
            json!("livekit"),
        ] {
            assert_eq!(livekit_focus(&entry), None, "{entry}");
        }
    }

    #[test]
    fn entries_of_one_deployment_merge() {
        let list = json!([
            {"type": "livekit", "livekit_service_url": "https://jwt.example"},
            {"type": "other"},
            {"type": "m.livekit", "url": "wss://other.example"},
            {"type": "m.livekit", "url": "wss://SFU.example/"},
            {"type": "livekit", "livekit_service_url": "https://jwt.example/", "url": "wss://sfu.example"},
        ]);
        let published = published(&list, "list").unwrap();
        assert!(published.names_merged_type);
        assert_eq!(
            published.foci,
            [
                focus(Some("https://jwt.example"), Some("wss://sfu.example")),
                focus(None, Some("wss://other.example"))
            ]
        );
    }

    #[test]
    fn lists_of_entries_without_type_are_malformed() {
        for list in [json!({}), json!([{}]), json!([1]), json!([{"type": 1}])] {
            assert_eq!(published(&list, "list"), Err(Ignored::Malformed("list")), "{list}");
        }
        assert_eq!(published(&json!([]), "list"), Ok(Published::default()));
    }

    #[test]
    fn mesh_entry_is_read_beside_foci() {
        let mesh = |session: Value| json!({"type": "dev.antiphon.mesh", "session_id": session});
        let list = json!([
            {"type": "livekit", "livekit_service_url": "https://jwt.example"},
            mesh(json!("")), mesh(json!(1)), mesh(json!("x".repeat(256))), mesh(json!("s1")), mesh(json!("s2")),
        ]);
        let published = published(&list, "list").unwrap();
        assert_eq!(published.foci, [focus(Some("https://jwt.example"), None)]);
        assert_eq!(published.mesh, Some(MeshSession("s1".to_owned())));
    }

    #[test]
    fn long_list_is_cut_off() {
        let list: Vec<_> =
            (0..1000).map(|n| json!({"type": "m.livekit", "url": format!("wss://sfu{n}.example")})).collect();
        assert_eq!(published(&Value::from(list), "list").unwrap().foci.len(), MAX_ENTRIES);
    }
}
