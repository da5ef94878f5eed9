//! The query of `/rtc` (signalling v0).

use std::collections::HashMap;

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use livekit_protocol::{ClientInfo, client_info};

/// Longest query that is read, in bytes.
const MAX_QUERY: usize = 1024 * 1024;
/// Longest text that a client may say about itself, in bytes. Longer ones are cut.
const MAX_TEXT: usize = 256;

/// base64url, padded or not: clients do both.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::URL_SAFE,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// What a client asks for when it connects.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct JoinQuery {
    pub(crate) reconnect: bool,
    pub(crate) auto_subscribe: bool,
    pub(crate) adaptive_stream: bool,
    /// A publish-only second connection, which no current SDK uses.
    pub(crate) publish: bool,
    /// Signalling v1 in a v0 path.
    pub(crate) join_request: bool,
    pub(crate) attributes: HashMap<String, String>,
    pub(crate) client: ClientInfo,
}

/// What a client's query says wrongly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum QueryError {
    #[error("the query is too long")]
    TooLong,
    #[error("the query parameter {0} is neither a number nor a yes or no that can be read")]
    Unreadable(&'static str),
    #[error("the query parameter attributes is not base64url of a JSON object of strings")]
    Attributes,
}

impl JoinQuery {
    pub(crate) fn parse(query: &str) -> Result<Self, QueryError> {
        if query.len() > MAX_QUERY {
            return Err(QueryError::TooLong);
        }
        let values: HashMap<_, _> = url::form_urlencoded::parse(query.as_bytes()).collect();
        let text = |name: &str| values.get(name).map(|value| cut(value)).unwrap_or_default();
        let flag = |name: &'static str, default: bool| match values.get(name).map(AsRef::as_ref) {
            None | Some("") => Ok(default),
            Some("1" | "true" | "True" | "TRUE" | "t") => Ok(true),
            Some("0" | "false" | "False" | "FALSE" | "f") => Ok(false),
            Some(_) => Err(QueryError::Unreadable(name)),
        };
        let number = |name: &'static str| match values.get(name).map(AsRef::as_ref) {
            None | Some("") => Ok(0),
            Some(value) => value.parse::<i32>().map_err(|_| QueryError::Unreadable(name)),
        };
        let attributes = match values.get("attributes") {
            None => HashMap::new(),
            Some(encoded) if encoded.is_empty() => HashMap::new(),
            Some(encoded) => {
                let json = BASE64.decode(encoded.as_bytes()).map_err(|_| QueryError::Attributes)?;
                serde_json::from_slice(&json).map_err(|_| QueryError::Attributes)?
            }
        };
        let client = ClientInfo {
            sdk: sdk(&text("sdk")).into(),
            version: text("version"),
            protocol: number("protocol")?,
            os: text("os"),
            os_version: text("os_version"),
            device_model: text("device_model"),
            browser: text("browser"),
            browser_version: text("browser_version"),
            network: text("network"),
            client_protocol: number("client_protocol")?,
            capabilities: values
                .get("capabilities")
                .map(|list| list.split(',').filter_map(capability).take(32).collect())
                .unwrap_or_default(),
            ..ClientInfo::default()
        };
        Ok(Self {
            reconnect: flag("reconnect", false)?,
            auto_subscribe: flag("auto_subscribe", true)?,
            adaptive_stream: flag("adaptive_stream", false)?,
            publish: values.get("publish").is_some_and(|value| !value.is_empty()),
            join_request: values.get("join_request").is_some_and(|value| !value.is_empty()),
            attributes,
            client,
        })
    }
}

/// The token, which is read even if the rest cannot be: who asks is checked before what is asked.
pub(crate) fn access_token(query: &str) -> Option<String> {
    let (_, token) =
        url::form_urlencoded::parse(query.as_bytes()).find(|(name, _)| name == "access_token")?;
    Some(token.into_owned()).filter(|token| !token.is_empty())
}

fn cut(text: &str) -> String {
    text.chars().take(MAX_TEXT).collect()
}

fn sdk(name: &str) -> client_info::Sdk {
    use client_info::Sdk;
    match name {
        "js" => Sdk::Js,
        "ios" | "swift" => Sdk::Swift,
        "android" => Sdk::Android,
        "flutter" => Sdk::Flutter,
        "go" => Sdk::Go,
        "unity" => Sdk::Unity,
        "reactnative" => Sdk::ReactNative,
        "rust" => Sdk::Rust,
        "python" => Sdk::Python,
        "cpp" => Sdk::Cpp,
        "unityweb" => Sdk::UnityWeb,
        "node" => Sdk::Node,
        _ => Sdk::Unknown,
    }
}

fn capability(name: &str) -> Option<i32> {
    client_info::Capability::from_str_name(name.trim()).map(i32::from)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_query_of_livekit_client_is_read() {
        let query = JoinQuery::parse(
            "access_token=ey.J.x&auto_subscribe=1&sdk=js&version=2.23.0&protocol=17&client_protocol=2\
             &adaptive_stream=1&attributes=eyJhIjoiYiJ9&capabilities=CAP_PACKET_TRAILER,CAP_NEW",
        )
        .unwrap();
        assert!(query.auto_subscribe && query.adaptive_stream && !query.reconnect);
        assert_eq!(query.client.protocol, 17);
        assert_eq!(query.client.client_protocol, 2);
        assert_eq!(query.client.sdk(), client_info::Sdk::Js);
        assert_eq!(query.client.capabilities, [1]);
        assert_eq!(query.attributes["a"], "b");
    }

    #[test]
    fn the_token_is_read_whatever_the_rest() {
        assert_eq!(access_token("protocol=new&access_token=ey.J.x").as_deref(), Some("ey.J.x"));
        assert_eq!(access_token("access_token="), None);
    }

    #[test]
    fn what_is_left_out_has_its_default() {
        let query = JoinQuery::parse("").unwrap();
        assert!(query.auto_subscribe && !query.adaptive_stream && !query.reconnect);
        assert_eq!(query.client.protocol, 0);
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        assert_eq!(JoinQuery::parse("protocol=new"), Err(QueryError::Unreadable("protocol")));
        assert_eq!(JoinQuery::parse("reconnect=maybe"), Err(QueryError::Unreadable("reconnect")));
        assert_eq!(JoinQuery::parse("attributes=%25"), Err(QueryError::Attributes));
    }

    proptest! {
        #[test]
        fn parsing_never_panics(query in "[ -~]{0,300}") {
            let _ = JoinQuery::parse(&query);
        }
    }
}
