//! What must hold for any answer of a homeserver about a token.

use serde_json::Value;

use super::verified_user;
use crate::fuzzing::first_value;

/// The body of an answer of `server_name`.
pub(crate) fn userinfo_answer(server_name: &str, body: &[u8]) {
    let verdict = verified_user(body, server_name);
    if let Ok(user) = &verdict {
        let (_, domain) = user.user_id().split_once(':').unwrap_or_default();
        assert_eq!(domain, server_name, "a server speaks for its own users only");
    }
    if let Some(value @ Value::Object(_)) = first_value(body) {
        let sub =
            value["sub"].as_str().filter(|sub| sub.split_once(':').is_some_and(|(_, d)| d == server_name));
        assert_eq!(verdict.ok().as_ref().map(|user| user.user_id()), sub, "another reading of it");
    }
}
