//! What must hold for any list of servers that an operator writes.

use super::{
    Found,
    lists::{names, urls},
};
use crate::FullAccess;

/// `LIVEKIT_FULL_ACCESS_HOMESERVERS` and `LIVEKIT_CS_API_URL_OVERRIDES`.
pub(crate) fn lists_of_servers(list: &str, pairs: &str) {
    let written = names(list);
    let again: Vec<&str> = written.iter().map(String::as_str).collect();
    assert_eq!(names(&again.join(",")), written);
    assert!(!written.iter().any(|name| name.is_empty() || name.contains(',')));
    let access = FullAccess::Only(written.clone());
    for name in &written {
        assert!(access.includes(&name.to_ascii_uppercase()), "{name} has no access");
        assert!(!access.includes(&format!("{name}.")) || written.len() > 1, "more than {name} has access");
    }

    let found = |text| Found { text, place: "a setting".to_owned() };
    let Ok(written) = urls(&found(pairs)) else { return };
    for (name, url) in &written {
        assert!(!name.is_empty() && *name == name.to_ascii_lowercase());
        assert!(matches!(url.scheme(), "http" | "https") && url.has_host());
        assert!(url.as_str().parse::<hyper::Uri>().is_ok(), "no request can be made to {url}");
    }
    let again: Vec<String> = written.iter().map(|(name, url)| format!("{name}={url}")).collect();
    assert_eq!(urls(&found(&again.join(","))).ok(), Some(written), "written and read again");
}
