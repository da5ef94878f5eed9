//! The homeserver that this service answers for.

use url::Url;

use super::{
    super::{ConfigError, sources::Sources},
    keys::read,
};
use crate::{
    homeserver_side::{BadSigningKey, HomeserverSide},
    secret::Secret,
};

/// The homeserver to answer for, if its name is set; the rest needs it.
pub(super) fn homeserver(sources: &Sources) -> Result<Option<HomeserverSide>, ConfigError> {
    const NAME: &str = "LIVEKIT_JWT_HOMESERVER_NAME";
    const URL: &str = "LIVEKIT_JWT_HOMESERVER_URL";
    let as_token = sources.find("LIVEKIT_JWT_HOMESERVER_AS_TOKEN_FILE");
    let signing_key = sources.find("LIVEKIT_JWT_HOMESERVER_SIGNING_KEY_FILE");
    let (name, url) = match (sources.find(NAME), sources.find(URL)) {
        (Some(name), Some(url)) => (name, url),
        (Some(name), None) => return Err(ConfigError::Alone(name.place, URL)),
        (None, url) => {
            return match url.or(as_token).or(signing_key) {
                Some(found) => Err(ConfigError::Alone(found.place, NAME)),
                None => Ok(None),
            };
        }
    };
    let server = name.text.parse().map_err(|_| {
        name.malformed(
            format_args!("{:?} is not a server name", name.text),
            "what comes after the colon in your users' Matrix IDs, such as example.com",
        )
    })?;
    // Not quoted: it may hold a password, which is one of the reasons to refuse it.
    let base = Url::parse(url.text).ok().filter(|base| {
        let plain = base.username().is_empty()
            && base.password().is_none()
            && base.query().is_none()
            && base.fragment().is_none();
        matches!(base.scheme(), "http" | "https") && base.has_host() && plain
    });
    let base = base.ok_or_else(|| {
        url.malformed(
            "not an address to which API paths can be appended",
            "the client-server API as it is reached from here, such as http://127.0.0.1:8008",
        )
    })?;
    let mut side = HomeserverSide::new(server, base);
    if let Some(found) = as_token {
        let token = Secret::new(read(&found)?.expose().trim());
        if token.is_empty() || !token.expose().bytes().all(|b| b.is_ascii_graphic()) {
            return Err(found.malformed(
                format_args!("{} does not hold a token", found.text),
                "the as_token of the registration into it",
            ));
        }
        side.application_service_token = Some(token);
    }
    if let Some(found) = signing_key {
        let key = read(&found)?.expose().parse();
        side.signing_key = Some(key.map_err(|problem: BadSigningKey| {
            found.malformed(
                format_args!("{}: {problem}", found.text),
                "the path of the homeserver's signing key, Synapse's signing_key_path",
            )
        })?);
    }
    Ok(Some(side))
}
