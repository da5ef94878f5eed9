//! The settings in effect, as a TOML file.

use std::{collections::BTreeMap, fmt::Write as _};

use url::Url;

use super::{
    load,
    setting::{Kind, SETTINGS, Setting},
    sources::Sources,
};

const REDACTED: &str = "[redacted]";

pub(super) fn print(sources: &Sources) -> String {
    let mut text = String::new();
    let mut tables = String::new();
    for setting in SETTINGS {
        let Some(key) = setting.key else { continue };
        let found = sources.find(setting.variable);
        let place = found.as_ref().map_or("default", |found| &found.place);
        let value = found.as_ref().map_or(setting.default, |found| found.text);
        if setting.variable == "LIVEKIT_JWT_BIND"
            && let Some(line) = port(sources)
        {
            text.push_str(&line);
            continue;
        }
        // Writing to a String does not fail.
        let _ = match setting.kind {
            _ if value.is_empty() => writeln!(text, "# {key} is not set"),
            Kind::Map => write!(tables, "\n[{key}]  # {place}\n{}", map(value, without_password)),
            Kind::Secrets => {
                write!(tables, "\n[{key}]  # {place}\n{}", map(value, |_| REDACTED.to_owned()))
            }
            _ => writeln!(text, "{key} = {}  # {place}", shown(setting, value)),
        };
    }
    text + &tables
}

/// The line for where to listen, if the deprecated variable has a say in it.
fn port(sources: &Sources) -> Option<String> {
    const VARIABLES: usize = 1;
    let old = sources.find("LIVEKIT_JWT_PORT")?;
    // A flag goes before it, a file after it, and another variable excludes it.
    let newer = (0..=VARIABLES).any(|layer| sources.at(layer, "LIVEKIT_JWT_BIND").is_some());
    match load::bind(sources, &mut Vec::new()) {
        Ok(bind) if !newer => Some(format!("bind = {}  # {}\n", quoted(&bind.to_string()), old.place)),
        Ok(_) => None,
        Err(error) => Some(format!("# bind: {error}\n")),
    }
}

fn shown(setting: &Setting, value: &str) -> String {
    match setting.variable {
        "LIVEKIT_SECRET" => quoted(REDACTED),
        "LIVEKIT_REDIS_URL" | "LIVEKIT_URL" | "LIVEKIT_JWT_HOMESERVER_URL" => {
            quoted(&without_password(value))
        }
        _ => match setting.kind {
            // As a file says it, which knows no leading zeros. Whatever is no number is refused elsewhere.
            Kind::Number => value.parse::<i64>().map_or_else(|_| quoted(value), |n| n.to_string()),
            Kind::List => {
                let names = value.replace(',', " ");
                format!("[{}]", names.split_whitespace().map(quoted).collect::<Vec<_>>().join(", "))
            }
            _ => quoted(value),
        },
    }
}

fn map(value: &str, shown: fn(&str) -> String) -> String {
    let entry = |entry: &str| {
        let (name, url) = entry.split_once('=')?;
        let url = toml::Value::String(shown(url.trim()));
        Some((name.trim().to_ascii_lowercase(), (name.trim().to_owned(), url)))
    };
    // Of a name that occurs twice the last counts, and a table can hold no other.
    let entries: BTreeMap<_, _> = value.split(',').filter_map(entry).collect();
    entries.into_values().collect::<toml::Table>().to_string()
}

/// A URL whose password, and whatever its query holds, is not shown.
fn without_password(text: &str) -> String {
    let Ok(mut url) = Url::parse(text) else { return REDACTED.to_owned() };
    if url.password().is_none() && url.query().is_none() {
        return text.to_owned();
    }
    if url.password().is_some() && url.set_password(Some(REDACTED)).is_err() {
        return REDACTED.to_owned();
    }
    if url.query().is_some() {
        url.set_query(Some(REDACTED));
    }
    // The brackets come back percent-encoded.
    url.to_string().replace("%5Bredacted%5D", REDACTED)
}

fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}
