//! What must hold for any `url` of a request.

use url::Url;

use super::is_same;

/// `ours` is the SFU's URL of the settings, `url` what a client sends.
pub(crate) fn sfu_url(url: &str, ours: &Url) {
    assert!(is_same(url, url), "{url:?}");
    let same = is_same(url, ours.as_str());
    assert_eq!(is_same(ours.as_str(), url), same, "{url:?}");
    if same {
        let Ok(url) = Url::parse(url) else { panic!("{url:?} is no URL") };
        assert_eq!((url.scheme(), url.username(), url.password()), (ours.scheme(), "", None), "{url}");
        assert_eq!((url.host(), url.port_or_known_default()), (ours.host(), ours.port_or_known_default()));
        assert_eq!(url.path().trim_end_matches('/'), ours.path().trim_end_matches('/'), "{url}");
        assert!(url.query().is_none() && url.fragment().is_none(), "{url}");
    }
}
