//! Settings that list servers: names alone, or with a URL or a token for each.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use url::Url;

use super::{
    super::{
        ConfigError, FullAccess, Warning,
        sources::{Found, Sources},
    },
    keys::read,
};
use crate::{openid::ServerName, secret::Secret};

pub(super) fn full_access(sources: &Sources, warnings: &mut Vec<Warning>) -> Result<FullAccess, ConfigError> {
    let found = sources.find("LIVEKIT_FULL_ACCESS_HOMESERVERS").ok_or(ConfigError::Missing {
        variable: "LIVEKIT_FULL_ACCESS_HOMESERVERS",
        advice: "the server names whose users may start calls, separated by commas, or * for all",
    })?;
    let names = names(found.text);
    if is_wildcard(found.text) {
        return Ok(FullAccess::All);
    }
    if names.is_empty() {
        warnings.push(Warning::NobodyHasFullAccess);
    }
    warn(&found, &names, Warning::WildcardInList, warnings);
    Ok(FullAccess::Only(names))
}

/// Whose users get tokens at all; `None` is everybody's.
pub(super) fn allowed(sources: &Sources, warnings: &mut Vec<Warning>) -> Option<BTreeSet<String>> {
    let found = sources.find("LIVEKIT_JWT_ALLOWED_HOMESERVERS")?;
    let names = names(found.text);
    if is_wildcard(found.text) {
        return None;
    }
    warn(&found, &names, Warning::WildcardInAllowed, warnings);
    Some(names)
}

/// The servers that may be on private addresses.
pub(super) fn private(sources: &Sources, warnings: &mut Vec<Warning>) -> BTreeSet<String> {
    let Some(found) = sources.find("LIVEKIT_PRIVATE_HOMESERVERS") else { return BTreeSet::new() };
    let names = names(found.text);
    warn(&found, &names, Warning::WildcardInPrivate, warnings);
    names
}

/// What in a list has no effect; `star` says it of a star.
fn warn(found: &Found<'_>, names: &BTreeSet<String>, star: Warning, warnings: &mut Vec<Warning>) {
    if names.contains("*") {
        warnings.push(star);
    }
    warnings.extend(no_servers(found, names.iter().filter(|name| *name != "*")));
}

/// What in a list can be no server's name: a slip, and yet no reason not to start.
fn no_servers<'a>(
    found: &Found<'_>,
    names: impl IntoIterator<Item = &'a String>,
) -> impl Iterator<Item = Warning> {
    let place = found.place.clone();
    let wrong = names.into_iter().filter(|name| name.parse::<ServerName>().is_err());
    wrong.map(move |name| Warning::NoServer { place: place.clone(), name: name.clone() })
}

/// Names separated by commas or white space.
pub(super) fn names(text: &str) -> BTreeSet<String> {
    text.replace(',', " ").split_whitespace().map(str::to_owned).collect()
}

/// Whether a list is a star alone: one that somebody wrote into a longer list is a slip, not everybody.
fn is_wildcard(text: &str) -> bool {
    text.replace(',', " ").split_whitespace().eq(["*"])
}

/// Client-server APIs in place of discovery.
pub(super) fn overrides(
    sources: &Sources,
    warnings: &mut Vec<Warning>,
) -> Result<BTreeMap<String, Url>, ConfigError> {
    let Some(found) = sources.find("LIVEKIT_CS_API_URL_OVERRIDES") else { return Ok(BTreeMap::new()) };
    let urls = urls(&found)?;
    warnings.extend(no_servers(&found, urls.keys()));
    Ok(urls)
}

/// `server_name=url`, separated by commas. A name occurring twice has the last URL.
pub(super) fn urls(found: &Found<'_>) -> Result<BTreeMap<String, Url>, ConfigError> {
    const ADVICE: &str = "server_name=https://host for each, separated by commas, without a comma at the end";
    let wrong = |problem: fmt::Arguments<'_>| found.malformed(problem, ADVICE);
    let entry = |entry: &str| {
        let (name, url) =
            entry.split_once('=').ok_or_else(|| wrong(format_args!("{:?} has no =", entry.trim())))?;
        let (name, url) = (name.trim(), url.trim());
        if name.is_empty() || url.is_empty() {
            return Err(wrong(format_args!("{:?} lacks a name or a URL", entry.trim())));
        }
        let url = Url::parse(url)
            .ok()
            .filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
            // URLs may have hosts that requests may not: `https://a}b`.
            .filter(|url| url.as_str().parse::<hyper::Uri>().is_ok())
            .ok_or_else(|| wrong(format_args!("the URL for {name:?} does not begin with https://host")))?;
        if !url.username().is_empty() || url.password().is_some() {
            return Err(wrong(format_args!("the URL for {name:?} has a user name, which cannot be sent")));
        }
        Ok((name.to_ascii_lowercase(), url))
    };
    found.text.split(',').map(entry).collect()
}

/// `server_name=token`, separated by commas, or one a line in a file. Nothing of it is quoted.
pub(super) fn delayed_event_tokens(sources: &Sources) -> Result<BTreeMap<String, Secret>, ConfigError> {
    const ADVICE: &str = "server_name=token for each: separated by commas, or in a file one a line";
    let listed = sources.find("LIVEKIT_JWT_DELAYED_EVENT_TOKENS");
    let filed = sources.find("LIVEKIT_JWT_DELAYED_EVENT_TOKENS_FROM_FILE");
    let (found, text, separator) = match (listed, filed) {
        (None, None) => return Ok(BTreeMap::new()),
        (Some(listed), Some(filed)) => return Err(ConfigError::Conflict(filed.place, listed.place)),
        (Some(listed), None) => {
            let text = Secret::new(listed.text);
            (listed, text, ',')
        }
        (None, Some(filed)) => {
            let text = read(&filed)?;
            (filed, text, '\n')
        }
    };
    let entries = text.expose().split(separator).map(str::trim);
    let entries =
        entries.enumerate().filter(|(_, e)| separator == ',' || !(e.is_empty() || e.starts_with('#')));
    let entry = |(index, entry): (usize, &str)| {
        let number = index + 1;
        let wrong = |what: &str| found.malformed(format_args!("entry {number} {what}"), ADVICE);
        let (name, token) = entry.split_once('=').ok_or_else(|| wrong("has no ="))?;
        let (name, token) = (name.trim(), token.trim());
        name.parse::<ServerName>().map_err(|_| wrong("does not begin with a server name"))?;
        if token.is_empty() || !token.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(wrong("has no token, or one that is more than a word of ASCII"));
        }
        Ok((name.to_ascii_lowercase(), Secret::new(token)))
    };
    entries.map(entry).collect()
}
