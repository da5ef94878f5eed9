//! The SFU's API key and secret, from settings or files, and files that hold one secret at all.

use std::{fs, io, path::PathBuf};

use super::super::{
    ConfigError,
    sources::{Found, LAYERS, Sources},
};
use crate::secret::Secret;

const ONE_LINE: &str = "one line, `key: secret`, into that file";

/// Key and secret: from the two-in-one file, else each from its own file, else each from its own setting. The
/// first layer that has any of these for the key decides the key, and likewise for the secret.
pub(super) fn key_and_secret(sources: &Sources) -> Result<(String, Secret), ConfigError> {
    let key = one(sources, "LIVEKIT_KEY", "LIVEKIT_KEY_FROM_FILE", |(key, _)| key)?;
    let secret = one(sources, "LIVEKIT_SECRET", "LIVEKIT_SECRET_FROM_FILE", |(_, secret)| secret)?;
    let key = key.ok_or(ConfigError::Missing {
        variable: "LIVEKIT_KEY",
        advice: "the SFU's API key, or name a file that holds it in LIVEKIT_KEY_FROM_FILE, or a file \
                 with `key: secret` in LIVEKIT_KEY_FILE",
    })?;
    let secret = secret.ok_or(ConfigError::Missing {
        variable: "LIVEKIT_SECRET",
        advice: "the SFU's API secret, or name a file that holds it in LIVEKIT_SECRET_FROM_FILE, or a file \
                 with `key: secret` in LIVEKIT_KEY_FILE",
    })?;
    Ok((key.expose().to_owned(), secret))
}

/// One of the two; `None` if it is nowhere.
fn one(
    sources: &Sources,
    plain: &'static str,
    file: &'static str,
    half: fn((Secret, Secret)) -> Secret,
) -> Result<Option<Secret>, ConfigError> {
    for layer in 0..LAYERS {
        let (text, found, inside, advice) = if let Some(found) = sources.at(layer, "LIVEKIT_KEY_FILE") {
            (key_file(&found).map(half)?, found.clone(), found.text, ONE_LINE)
        } else if let Some(found) = sources.at(layer, file) {
            (read(&found)?, found.clone(), found.text, "what the SFU has into that file")
        } else if let Some(found) = sources.at(layer, plain) {
            (Secret::new(found.text), found, "it", "what the SFU has")
        } else {
            continue;
        };
        // Editors end files with line breaks. Tabs stay: they may belong to the secret.
        let text = Secret::new(text.expose().trim_matches([' ', '\r', '\n']));
        if !text.is_empty() {
            return Ok(Some(text));
        }
        let what = if plain == "LIVEKIT_KEY" { "key" } else { "secret" };
        return Err(found.malformed(format_args!("there is no {what} in {inside}"), advice));
    }
    Ok(None)
}

/// One `key: secret` line. The secret may contain colons.
fn key_file(found: &Found<'_>) -> Result<(Secret, Secret), ConfigError> {
    let text = read(found)?;
    let says = |line: &&str| !line.trim().is_empty() && !line.trim_start().starts_with('#');
    let mut lines = text.expose().lines().filter(says);
    let wrong = |what| found.malformed(format_args!("{} {what}", found.text), ONE_LINE);
    let line = lines.next().ok_or_else(|| wrong("is empty"))?;
    if lines.next().is_some() {
        return Err(wrong("has more than one line"));
    }
    let (key, secret) = line.split_once(':').ok_or_else(|| wrong("has no colon"))?;
    Ok((Secret::new(key), Secret::new(secret)))
}

/// The whole of a file that a setting names.
pub(super) fn read(found: &Found<'_>) -> Result<Secret, ConfigError> {
    let path = PathBuf::from(found.text);
    let no_text = |what| {
        found.malformed(
            format_args!("{} {what}", path.display()),
            "the path of a text file: is it another file, or in another encoding?",
        )
    };
    let text = match fs::read_to_string(&path) {
        Ok(text) => Secret::new(text),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            return Err(no_text("is not text in UTF-8"));
        }
        Err(source) => return Err(ConfigError::Unreadable { place: found.place.clone(), path, source }),
    };
    // Both are UTF-8, and neither can be seen in an editor: a key that has one is no key that the SFU knows.
    if text.expose().contains('\0') {
        return Err(no_text("is not text: it has bytes that are 0"));
    }
    if text.expose().starts_with('\u{feff}') {
        return Err(no_text("begins with a byte order mark"));
    }
    Ok(text)
}
