//! Fields of a content, with their bounds.

use serde_json::{Map, Value};

use super::Ignored;
use crate::time::UnixMillis;

pub(super) type Fields = Map<String, Value>;

/// Longest identifier (device, member, call) taken from an event, in bytes; that of Matrix identifiers.
pub(super) const MAX_IDENTIFIER: usize = 255;

pub(super) fn object<'a>(of: &'a Fields, name: &'static str) -> Result<&'a Fields, Ignored> {
    of.get(name).ok_or(Ignored::Missing(name))?.as_object().ok_or(Ignored::Malformed(name))
}

pub(super) fn text<'a>(of: &'a Fields, name: &'static str) -> Result<&'a str, Ignored> {
    optional_text(of, name)?.ok_or(Ignored::Missing(name))
}

pub(super) fn optional_text<'a>(of: &'a Fields, name: &'static str) -> Result<Option<&'a str>, Ignored> {
    match of.get(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(Ignored::Malformed(name)),
    }
}

/// A text of 1 to 255 bytes.
pub(super) fn identifier<'a>(of: &'a Fields, name: &'static str) -> Result<&'a str, Ignored> {
    optional_identifier(of, name)?.ok_or(Ignored::Missing(name))
}

pub(super) fn optional_identifier<'a>(
    of: &'a Fields,
    name: &'static str,
) -> Result<Option<&'a str>, Ignored> {
    let text = optional_text(of, name)?;
    if text.is_some_and(|text| !(1..=MAX_IDENTIFIER).contains(&text.len())) {
        return Err(Ignored::Malformed(name));
    }
    Ok(text)
}

/// A JavaScript sender may write a fraction or a negative number; both are read as the nearest valid time.
pub(super) fn optional_millis(of: &Fields, name: &'static str) -> Result<Option<UnixMillis>, Ignored> {
    let Some(value) = of.get(name) else { return Ok(None) };
    // `as` saturates: a negative number becomes 0, one that is too large u64::MAX.
    let millis = value.as_u64().or_else(|| value.as_f64().map(|millis| millis as u64));
    millis.map(|millis| Some(UnixMillis(millis))).ok_or(Ignored::Malformed(name))
}

/// An intent is shown and compared; an overlong one is dropped.
pub(super) fn intent(text: Option<&str>) -> Option<String> {
    text.filter(|text| text.len() <= MAX_IDENTIFIER).map(str::to_owned)
}
