//! A star opens a list to everybody only where it stands alone: anything else is a slip of somebody who meant less.

use antiphon_jwt_service::{Config, FullAccess, Sources};

fn config(lists: &str) -> Config {
    let toml = format!("livekit_url = 'ws://x'\nkey = 'k'\nsecret = 's'\n{lists}\n");
    Config::load(&Sources::default().with_toml("x".as_ref(), &toml.into()).unwrap()).unwrap()
}

#[test]
fn a_star_written_twice_is_not_everybody() {
    let full_access = |list: &str| {
        config(&format!("full_access_homeservers = '{list}'")).settings.full_access.includes("hs.org")
    };
    assert!(full_access("*") && full_access(" *, "));
    for list in ["* *", "*,*", "*, *,"] {
        assert!(!full_access(list), "{list}");
    }
}

#[test]
fn nor_is_it_among_those_who_get_tokens() {
    let admitted = |list: &str| {
        let lists = format!("full_access_homeservers = 'own.org'\nallowed_homeservers = '{list}'");
        config(&lists).settings.admits("hs.org")
    };
    assert!(admitted("*"));
    assert!(!admitted("* *"));
    assert_eq!(config("full_access_homeservers = '*'").settings.full_access, FullAccess::All);
}
