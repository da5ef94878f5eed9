//! What must hold for any configuration file.

use std::path::Path;

use super::{SETTINGS, Sources};
use crate::{Config, Warning, fuzzing::text, secret::Secret};

/// The secret of the file, which no input contains.
const SECRET: &str = "c0ffee-hunter2";

/// What a configuration is, wherever it stands.
fn placeless(config: &Config) -> String {
    let mut config = config.clone();
    for warning in &mut config.warnings {
        if let Warning::NoServer { place, .. } = warning {
            place.clear();
        }
    }
    format!("{config:?}")
}

/// A file, to which the secret is added where there is none.
pub(crate) fn settings_file(data: &[u8]) {
    let data = text(data);
    if data.contains(SECRET) {
        return;
    }
    let file = Secret::new(format!("secret = \"{SECRET}\"\n{data}"));
    let sources = match Sources::default().with_toml(Path::new("file"), &file) {
        Ok(sources) => sources,
        Err(error) => return assert!(!error.to_string().contains(SECRET), "{error}"),
    };
    // What they name would be opened, and an input can name anything.
    let names_files = |s: &str| s.contains("KEY_FILE") || s.contains("FROM_FILE");
    if SETTINGS.iter().any(|s| names_files(s.variable) && sources.find(s.variable).is_some()) {
        return;
    }
    assert!(!format!("{sources:?}").contains(SECRET));
    let printed = Config::print(&sources);
    assert!(!printed.contains(SECRET), "{printed}");
    let again = Sources::default().with_toml(Path::new("printed"), &printed.into());
    let config = Config::load(&sources);
    match &config {
        Ok(config) => assert!(!format!("{config:?}").contains(SECRET)),
        Err(error) => assert!(!format!("{error} {error:?}").contains(SECRET)),
    }

    // The same as variables.
    let values = sources.file.map(|(_, values)| values).unwrap_or_default();
    let from_env = Config::load(&Sources::from_env(&|name| Some(values.get(name)?.expose().to_owned())));
    match (&config, from_env) {
        (Ok(file), Ok(variables)) => assert_eq!(placeless(file), placeless(&variables)),
        (Err(file), Err(variables)) => {
            assert_eq!(std::mem::discriminant(file), std::mem::discriminant(&variables));
        }
        (file, variables) => panic!("file: {file:?}, variables: {variables:?}"),
    }

    // What is printed can be read, and says the same where nothing is redacted.
    let again = match again {
        Ok(again) => again,
        Err(error) => panic!("what is printed cannot be read: {error}"),
    };
    if let (Ok(first), Ok(second)) = (&config, Config::load(&again)) {
        assert_eq!(first.settings.limits, second.settings.limits);
        assert_eq!(first.settings.full_access, second.settings.full_access);
        assert_eq!(first.settings.private_homeservers, second.settings.private_homeservers);
        assert_eq!(first.settings.token_lifetime, second.settings.token_lifetime);
        let named =
            |config: &Config| config.settings.cs_api_url_overrides.keys().cloned().collect::<Vec<_>>();
        assert_eq!(named(first), named(&second));
        assert_eq!((&first.bind, &first.metrics), (&second.bind, &second.metrics));
        assert_eq!((first.connections, first.grace), (second.connections, second.grace));
        assert_eq!(first.delegation, second.delegation);
    } else if let (Ok(_), Err(error)) = (&config, Config::load(&again)) {
        panic!("what is printed is refused: {error}");
    }
}
