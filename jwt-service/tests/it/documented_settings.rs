//! The operator's guide knows every setting, and no other.

use antiphon_jwt_service::SETTINGS;

const GUIDE: &str = include_str!("../../../docs/operators/jwt-service.md");

#[test]
fn every_setting_is_in_the_guide_with_its_default() {
    for setting in SETTINGS {
        let row = GUIDE.lines().find(|line| line.starts_with(&format!("| `{}` |", setting.variable)));
        let row = row.unwrap_or_else(|| panic!("{} is not in the guide", setting.variable));
        if let Some(key) = setting.key {
            assert!(row.contains(&format!("| `{key}` |")), "{key}: {row}");
        }
        if !setting.default.is_empty() {
            assert!(row.contains(&format!("| `{}` |", setting.default)), "{}: {row}", setting.default);
        }
    }
}

#[test]
fn the_guide_speaks_of_no_setting_that_is_none() {
    let words = GUIDE.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    for word in words.filter(|word| word.starts_with("LIVEKIT_") && !word.ends_with('_')) {
        assert!(SETTINGS.iter().any(|setting| setting.variable == word), "{word}");
    }
}
