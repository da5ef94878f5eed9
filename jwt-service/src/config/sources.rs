//! Where settings come from: flags, environment variables, one TOML file. All three give the same text, so
//! that each setting has one parser.

use std::{
    collections::BTreeMap,
    fmt, fs,
    path::{Path, PathBuf},
};

use toml::{Table, Value};

use super::{
    ConfigError,
    setting::{Kind, SETTINGS, Setting},
};
use crate::secret::Secret;

/// Settings as they are written, before any is understood. Flags win over variables, these over the file; an
/// empty value is the same as none.
#[derive(Clone, Default)]
pub struct Sources {
    flags: Values,
    environment: Values,
    file: Option<(PathBuf, Values)>,
}

/// By environment variable. Any value may be a secret.
type Values = BTreeMap<&'static str, Secret>;

impl Sources {
    /// The environment variables in [`SETTINGS`] that this process has.
    ///
    /// # Errors
    /// [`ConfigError`] if one of them is not UTF-8.
    pub fn from_process() -> Result<Self, ConfigError> {
        use std::env::{VarError, var};
        let not_text = |s: &&Setting| matches!(var(s.variable), Err(VarError::NotUnicode(_)));
        match SETTINGS.iter().find(not_text) {
            Some(setting) => Err(ConfigError::Malformed {
                place: setting.variable.to_owned(),
                problem: "the value is not text in UTF-8".to_owned(),
                advice: "it in UTF-8: letters beyond ASCII may be in another encoding".to_owned(),
            }),
            None => Ok(Self::from_env(&|name| var(name).ok())),
        }
    }

    /// The environment variables in [`SETTINGS`]; `variable` looks one up.
    pub fn from_env(variable: &impl Fn(&str) -> Option<String>) -> Self {
        let environment = SETTINGS
            .iter()
            .filter_map(|s| Some((s.variable, variable(s.variable).filter(|v| !v.is_empty())?.into())))
            .collect();
        Self { environment, ..Self::default() }
    }

    /// The same, with the flag of `setting` given.
    #[must_use]
    pub fn with_flag(mut self, setting: &'static Setting, value: String) -> Self {
        if !value.is_empty() {
            self.flags.insert(setting.variable, value.into());
        }
        self
    }

    /// The same, with the TOML file at `path`.
    ///
    /// # Errors
    /// [`ConfigError`] if it cannot be read, is not TOML, or has a key that is no setting.
    pub fn with_file(self, path: &Path) -> Result<Self, ConfigError> {
        let bytes = fs::read(path).map_err(|source| ConfigError::Unreadable {
            place: "--config".to_owned(),
            path: path.to_owned(),
            source,
        })?;
        let text = String::from_utf8(bytes).map(Secret::new).map_err(|error| ConfigError::NotToml {
            path: path.to_owned(),
            line: line_of(error.as_bytes(), error.utf8_error().valid_up_to()),
            problem: "it is not text in UTF-8".to_owned(),
        })?;
        self.with_toml(path, &text)
    }

    /// The same, with `text` as the content of the file at `path`.
    ///
    /// # Errors
    /// [`ConfigError`] if it is not TOML or has a key that is no setting.
    pub fn with_toml(mut self, path: &Path, text: &Secret) -> Result<Self, ConfigError> {
        let table: Table = text.expose().parse().map_err(|error: toml::de::Error| {
            let line = line_of(text.expose().as_bytes(), error.span().map_or(0, |span| span.start));
            ConfigError::NotToml { path: path.to_owned(), line, problem: error.message().to_owned() }
        })?;
        let mut values = Values::new();
        for (key, value) in table {
            let setting = SETTINGS.iter().find(|s| s.key == Some(&*key)).ok_or_else(|| {
                ConfigError::UnknownKey { path: path.to_owned(), advice: advice(&key), key: key.clone() }
            })?;
            let text = text_of(setting.kind, value).map_err(|expected| ConfigError::Malformed {
                place: format!("{key} in {}", path.display()),
                problem: "it has the wrong type".to_owned(),
                advice: expected.to_owned(),
            })?;
            if !text.is_empty() {
                values.insert(setting.variable, text.into());
            }
        }
        self.file = Some((path.to_owned(), values));
        Ok(self)
    }

    /// Every place where `variable` is set, the one that wins first.
    pub(super) fn all(&self, variable: &'static str) -> impl Iterator<Item = Found<'_>> {
        (0..LAYERS).filter_map(move |layer| self.at(layer, variable))
    }

    /// The place that wins.
    pub(super) fn find(&self, variable: &'static str) -> Option<Found<'_>> {
        self.all(variable).next()
    }

    /// What layer `layer` says: 0 flags, 1 environment, 2 file.
    pub(super) fn at(&self, layer: usize, variable: &'static str) -> Option<Found<'_>> {
        let setting = || SETTINGS.iter().find(|s| s.variable == variable);
        let (value, place) = match layer {
            0 => (self.flags.get(variable)?, format!("--{}", setting()?.flag?)),
            1 => (self.environment.get(variable)?, variable.to_owned()),
            _ => {
                let (path, values) = self.file.as_ref()?;
                (values.get(variable)?, format!("{} in {}", setting()?.key?, path.display()))
            }
        };
        Some(Found { text: value.expose(), place })
    }
}

/// Flags, environment, file.
pub(super) const LAYERS: usize = 3;

impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sources")
            .field("flags", &self.flags)
            .field("environment", &self.environment)
            .field("file", &self.file)
            .finish()
    }
}

/// A setting's text and where it stands.
#[derive(Clone, Debug)]
pub(super) struct Found<'a> {
    pub(super) text: &'a str,
    pub(super) place: String,
}

impl Found<'_> {
    pub(super) fn malformed(&self, problem: impl fmt::Display, advice: impl Into<String>) -> ConfigError {
        ConfigError::Malformed {
            place: self.place.clone(),
            problem: problem.to_string(),
            advice: advice.into(),
        }
    }
}

/// The number of the line that byte `offset` is in.
fn line_of(text: &[u8], offset: usize) -> usize {
    text.iter().take(offset).filter(|b| **b == b'\n').count() + 1
}

/// A TOML value as the environment variable would say it; of another type, what was expected.
fn text_of(kind: Kind, value: Value) -> Result<String, &'static str> {
    let text = match (kind, value) {
        (Kind::Text | Kind::List, Value::String(text)) => Some(text),
        // A port alone may stand where there is text.
        (Kind::Text | Kind::Number, Value::Integer(number)) => Some(number.to_string()),
        // An empty array means nobody, an unset one may mean the default.
        (Kind::List, Value::Array(values)) if values.is_empty() => Some(",".to_owned()),
        (Kind::List, Value::Array(values)) => joined(values, |value| value.as_str().map(str::to_owned)),
        (Kind::Map | Kind::Secrets, Value::Table(table)) => {
            joined(table, |(name, value)| Some(format!("{name}={}", value.as_str()?)))
        }
        _ => None,
    };
    text.ok_or(match kind {
        Kind::Text => "a string in quotes",
        Kind::Number => "a whole number without quotes",
        Kind::List => "an array of strings",
        Kind::Map => "a table of strings, such as \"example.com\" = \"https://matrix.example.com\"",
        Kind::Secrets => "a table of strings, such as \"example.com\" = \"token\"",
    })
}

/// All of `items`, separated by commas; `None` if one of them is no text.
fn joined<T>(items: impl IntoIterator<Item = T>, text: impl FnMut(T) -> Option<String>) -> Option<String> {
    items.into_iter().map(text).collect::<Option<Vec<_>>>().map(|texts| texts.join(","))
}

/// What somebody who wrote `key` may have meant.
fn advice(key: &str) -> String {
    let near = key.to_ascii_lowercase().replace('-', "_");
    let near = near.strip_prefix("livekit_jwt_").or_else(|| near.strip_prefix("livekit_")).unwrap_or(&near);
    let known = SETTINGS.iter().filter_map(|s| s.key).find(|known| {
        *known == near || known.strip_prefix("livekit_") == Some(near) || distance(known, near) <= 2
    });
    known.map_or_else(
        || "`jwt-service --help` lists them".to_owned(),
        |known| format!("did you mean {known:?}?"),
    )
}

/// Edit distance. Both are short: one is ours, and the other is a line of the operator's file.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod properties;
