//! What a homeserver says about an OpenID token (server-server API, `/openid/userinfo`).

use serde::Deserialize;

/// A Matrix user for whom the homeserver of that user has vouched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VerifiedUser {
    user_id: String,
}

impl VerifiedUser {
    /// The Matrix ID, as the homeserver wrote it.
    pub(crate) fn user_id(&self) -> &str {
        &self.user_id
    }
}

/// The user in `body`, if it is one of `server_name`: a server speaks for its own users only. The comparison
/// is exact, port and case included.
pub(crate) fn verified_user(body: &[u8], server_name: &str) -> Result<VerifiedUser, UserinfoError> {
    #[derive(Deserialize)]
    struct Userinfo {
        sub: String,
    }
    // Only the first JSON value counts; what follows it is ignored.
    let mut json = serde_json::Deserializer::from_slice(body);
    let Userinfo { sub } = Userinfo::deserialize(&mut json).map_err(|_| UserinfoError::NotUserinfo)?;
    match sub.split_once(':') {
        Some((_, domain)) if domain == server_name => Ok(VerifiedUser { user_id: sub }),
        _ => Err(UserinfoError::ForeignUser),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UserinfoError {
    #[error("the homeserver's answer is no JSON object with a string member `sub`")]
    NotUserinfo,
    #[error("the homeserver vouches for a user of another server")]
    ForeignUser,
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod properties;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_server_vouches_for_its_own_users() {
        let user = |body: &str| verified_user(body.as_bytes(), "hs.org:8448").map(|u| u.user_id);
        assert_eq!(user(r#"{"sub":"@a:hs.org:8448"}"#).unwrap(), "@a:hs.org:8448");
        assert_eq!(user(r#"{"sub":"@a:hs.org:8448","name":null} trailing"#).unwrap(), "@a:hs.org:8448");
        for foreign in ["@a:hs.org", "@a:HS.org:8448", "@a:b:hs.org:8448", "@a", "", "@a:hs.org:8448 "] {
            let body = serde_json::json!({ "sub": foreign }).to_string();
            assert_eq!(user(&body), Err(UserinfoError::ForeignUser), "{foreign}");
        }
        for bad in ["", "null", "[]", "{}", r#"{"sub":1}"#, r#"{"sub":null}"#, r#"{"sub":"@a:hs.org:8448""#] {
            assert_eq!(user(bad), Err(UserinfoError::NotUserinfo), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_answer_makes_it_panic(body in prop::collection::vec(any::<u8>(), 0..200), name in ".{0,20}") {
            if let Ok(user) = verified_user(&body, &name) {
                let suffix = format!(":{name}");
                prop_assert!(user.user_id().ends_with(&suffix));
            }
        }
    }
}
