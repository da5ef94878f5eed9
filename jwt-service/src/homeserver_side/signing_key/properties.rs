//! What must hold for any signing key file.

use std::sync::LazyLock;

use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
use hyper::{HeaderMap, header::AUTHORIZATION};

use super::{
    super::{server_keys::properties::keys_of, x_matrix::Credentials},
    BASE64, Ed25519KeyPair, Request, SEED, ServerName, SigningKey,
};

/// The key of the other server in the properties.
pub(in crate::homeserver_side) static THEIRS: LazyLock<SigningKey> = LazyLock::new(|| key(b't'));
/// A key that nobody publishes.
pub(in crate::homeserver_side) static NOBODYS: LazyLock<SigningKey> = LazyLock::new(|| key(b'n'));

fn key(seed: u8) -> SigningKey {
    let text = format!("ed25519 fixed {}", STANDARD_NO_PAD.encode([seed; SEED]));
    text.parse().unwrap_or_else(|error| panic!("{error}"))
}

impl SigningKey {
    pub(in crate::homeserver_side) fn pair(&self) -> &Ed25519KeyPair {
        &self.0
    }
}

/// The file's content.
pub(crate) fn signing_key_file(text: &str) {
    let parsed = text.parse::<SigningKey>();
    let expected = naive(text);
    assert_eq!(parsed.is_ok(), expected.is_some(), "{:?}", parsed.err());
    let (Ok(key), Some((version, word, seed))) = (parsed, expected) else { return };
    assert_eq!(format!("{key:?}"), format!("SigningKey(ed25519:{version}, [redacted])"));

    // However it is written, it is the same key.
    assert_eq!(BASE64.decode(word).as_deref(), Ok(&*seed));
    let again = format!("# written again\r\n\ted25519  {version} {}= \n!", STANDARD_NO_PAD.encode(&seed));
    let again: SigningKey = again.parse().unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(again.0.public_key(), key.0.public_key());

    // Another server believes what is signed with it. The names of keys that servers have are short.
    if version.len() > 255 {
        return;
    }
    let Ok(request) = Request::post("/_matrix/x").body("{}") else { return };
    let [one, two]: [Option<ServerName>; 2] = ["one.org", "two.org:8448"].map(|name| name.parse().ok());
    let (Some(one), Some(two)) = (one, two) else { return };
    let Some(header) = key.authorization(&request, &one, &two) else { panic!("nothing is signed") };
    let read = Credentials::read(&HeaderMap::from_iter([(AUTHORIZATION, header)]), &two);
    assert!(read.is_ok_and(|read| read.verify(&request, &two, &keys_of(&one, &again))));
}

/// The version, the third word and the seed.
fn naive(text: &str) -> Option<(&str, &str, Vec<u8>)> {
    let mut lines = text.split('\n').map(str::trim);
    let line = lines.find(|line| !line.is_empty() && !line.starts_with('#'))?;
    let words: Vec<_> = line.split_ascii_whitespace().collect();
    let ["ed25519", version, word] = words[..] else { return None };
    let version_letters = |c: char| c.is_ascii_alphanumeric() || c == '_';
    // Of the 43 letters the last has two bits too many.
    let letters = word.strip_suffix('=').unwrap_or(word);
    let values: Option<Vec<u8>> = letters.bytes().map(value).collect();
    let values = values.filter(|values| values.len() == 43 && version.chars().all(version_letters))?;
    let bits = values.iter().flat_map(|value| (0..6).rev().map(move |bit| value >> bit & 1));
    let bits: Vec<u8> = bits.collect();
    let seed = bits.chunks_exact(8).map(|byte| byte.iter().fold(0, |sum, bit| sum << 1 | bit)).collect();
    Some((version, word, seed))
}

fn value(letter: u8) -> Option<u8> {
    Some(match letter {
        b'A'..=b'Z' => letter - b'A',
        b'a'..=b'z' => letter - b'a' + 26,
        b'0'..=b'9' => letter - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        _ => return None,
    })
}
