//! Which focus this device publishes to (MSC4143 §Transport discovery).
//!
//! Sources, first usable one wins: the application's option; the homeserver's `rtc/transports` endpoint; the well-known
//! file of the user's domain; the application's fallback list; the focus of the oldest member of the call. A source
//! that answers with an empty list, with transports that we cannot use, or with an error is passed over, and
//! [`NoFocus`] tells what every source answered. After the homeserver's foci come the fallback list and the members' foci,
//! for the time when those are down.

use std::{collections::VecDeque, fmt, time::Duration};

use ruma_common::OwnedServerName;

use crate::{
    matrix::{
        ApiVersion, MatrixPort, MatrixReply, MatrixRequest, RequestError, ServerSupport, TransportSource,
    },
    member::{Device, Member},
    transport::{LiveKitFocus, NamedBy},
};

/// How long one request of discovery may take.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Waits before asking a source again that failed for a passing reason.
const BACKOFF: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(2)];
/// A source that asks us to wait longer than this is passed over.
const MAX_WAIT: Duration = Duration::from_secs(10);
/// Candidates taken from one source: each may cost a token exchange.
const MAX_CANDIDATES: usize = 4;

/// What the application says about foci.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct DiscoveryOptions {
    /// The focus to publish to; nothing else is asked then.
    pub focus: Option<LiveKitFocus>,
    /// Foci for users whose homeserver names none, by preference.
    pub fallback: Vec<LiveKitFocus>,
}

/// Foci of one source, by preference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Discovered {
    /// Where they are from.
    pub source: Source,
    /// At least one. Entries that name the same deployment are one.
    pub candidates: Vec<Candidate>,
    /// The sources that were passed over before.
    pub passed_over: Vec<Tried>,
}

/// A focus, and where we have it from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The focus.
    pub focus: LiveKitFocus,
    /// Where we have it from: decides what the policy allows, and which homeservers issue tokens.
    pub named_by: NamedBy,
}

/// A place where foci are listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Source {
    /// [`DiscoveryOptions::focus`].
    Option,
    /// Our homeserver.
    Homeserver(TransportSource),
    /// [`DiscoveryOptions::fallback`].
    Fallback,
    /// The members of the call.
    Members,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Option => "the application's choice",
            Self::Homeserver(TransportSource::Endpoint(ApiVersion::Stable)) => {
                "/_matrix/client/v1/rtc/transports"
            }
            Self::Homeserver(TransportSource::Endpoint(ApiVersion::Unstable)) => {
                "/_matrix/client/unstable/org.matrix.msc4143/rtc/transports"
            }
            Self::Homeserver(TransportSource::WellKnown) => "/.well-known/matrix/client",
            Self::Fallback => "the application's fallback list",
            Self::Members => "the members of the call",
        })
    }
}

/// A source that gave no focus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tried {
    /// Which.
    pub source: Source,
    /// Its error; `None` if it named no LiveKit focus that we can use.
    pub error: Option<RequestError>,
}

impl fmt::Display for Tried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.error {
            Some(error) => write!(f, "{}: {error}", self.source),
            None => write!(f, "{}: names no usable LiveKit focus", self.source),
        }
    }
}

/// No source names a focus.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct NoFocus {
    /// The user's homeserver.
    pub server: OwnedServerName,
    /// What was asked, and the answers.
    pub tried: Vec<Tried>,
}

impl NoFocus {
    pub(super) fn is_logged_out(&self) -> bool {
        self.tried.iter().any(|tried| tried.error == Some(RequestError::LoggedOut))
    }
}

impl fmt::Display for NoFocus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_logged_out() {
            return fmt::Display::fmt(&RequestError::LoggedOut, f);
        }
        write!(f, "no LiveKit focus found for users of {} (", self.server)?;
        for (n, tried) in self.tried.iter().enumerate() {
            let separator = if n == 0 { "" } else { "; " };
            write!(f, "{separator}{tried}")?;
        }
        f.write_str(
            "); its operator must list one in rtc/transports (Synapse: matrix_rtc.transports) or under \
             org.matrix.msc4143.rtc_foci in .well-known/matrix/client, or pass one in CallOptions::focus",
        )
    }
}

/// What discovery does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Wait, then perform [`MatrixRequest::Transports`], and pass the answer to [`Discovery::answered`].
    Ask {
        /// How long to wait first.
        after: Duration,
        /// Where to ask.
        source: TransportSource,
    },
    /// Done.
    Found(Discovered),
    /// Done, without a focus.
    Nothing(NoFocus),
}

/// The decision, without I/O: ask [`Discovery::next`], do it, tell the answer, until it is done.
#[derive(Debug)]
pub struct Discovery {
    server: OwnedServerName,
    sources: VecDeque<TransportSource>,
    /// Whether the server says that it has the endpoint: only then is a failure worth another try.
    flagged: bool,
    failures: usize,
    wait: Duration,
    fallback: Vec<Candidate>,
    members: Vec<Candidate>,
    tried: Vec<Tried>,
    found: Option<(Source, Vec<Candidate>)>,
}

impl Discovery {
    /// Discovery for `device` in a call of `members`, which may include the device itself.
    #[must_use]
    pub fn new(
        device: &Device,
        options: &DiscoveryOptions,
        support: &ServerSupport,
        members: &[Member],
    ) -> Self {
        // Some servers have the endpoint without the flag, so one that does not name it is asked once all the same.
        let endpoints = match support.transports {
            Some(ApiVersion::Stable) => &[ApiVersion::Stable, ApiVersion::Unstable][..],
            Some(ApiVersion::Unstable) | None => &[ApiVersion::Unstable],
        };
        let sources = endpoints.iter().map(|version| TransportSource::Endpoint(*version));
        let application = |focus: &LiveKitFocus| (focus.clone(), NamedBy::Application);
        let found = options
            .focus
            .as_ref()
            .map(|focus| (Source::Option, candidates(std::iter::once(application(focus)))));
        Self {
            server: device.user_id.server_name().to_owned(),
            sources: sources.chain([TransportSource::WellKnown]).collect(),
            flagged: support.transports.is_some(),
            failures: 0,
            wait: Duration::ZERO,
            fallback: candidates(options.fallback.iter().map(application)),
            members: of_members(device, members),
            tried: Vec::new(),
            found,
        }
    }

    /// What to do now.
    #[must_use]
    pub fn next(&self) -> Next {
        let found = |source, candidates: &[Candidate]| {
            let (candidates, passed_over) = (candidates.to_vec(), self.tried.clone());
            Next::Found(Discovered { source, candidates, passed_over })
        };
        if let Some((source, candidates)) = &self.found {
            return found(*source, candidates);
        }
        if let Some(source) = self.sources.front() {
            return Next::Ask { after: self.wait, source: *source };
        }
        let so_far = NoFocus { server: self.server.clone(), tried: self.tried.clone() };
        if so_far.is_logged_out() {
            return Next::Nothing(so_far);
        }
        if !self.fallback.is_empty() {
            return found(Source::Fallback, &self.fallback);
        }
        if !self.members.is_empty() {
            return found(Source::Members, &self.members);
        }
        let rest = [Source::Fallback, Source::Members].map(|source| Tried { source, error: None });
        let tried = self.tried.iter().cloned().chain(rest).collect();
        Next::Nothing(NoFocus { server: self.server.clone(), tried })
    }

    /// Takes the answer of the source that [`Next::Ask`] named.
    pub fn answered(&mut self, answer: Result<Vec<LiveKitFocus>, RequestError>) {
        let Some(source) = self.sources.front().copied() else { return };
        self.wait = Duration::ZERO;
        let error = match answer {
            Ok(foci) => {
                let mut candidates = candidates(foci.into_iter().map(|focus| (focus, NamedBy::Homeserver)));
                if !candidates.is_empty() {
                    // For when those are down.
                    for further in self.fallback.iter().chain(&self.members) {
                        if !candidates.iter().any(|known| known.focus.is_same_as(&further.focus)) {
                            candidates.push(further.clone());
                        }
                    }
                    self.found = Some((Source::Homeserver(source), candidates));
                    return;
                }
                None
            }
            Err(error) => {
                if let Some(wait) = self.retry(source, &error) {
                    self.failures += 1;
                    self.wait = wait;
                    return;
                }
                Some(error)
            }
        };
        self.failures = 0;
        self.sources.pop_front();
        if error == Some(RequestError::LoggedOut) {
            self.sources.clear();
        }
        self.tried.push(Tried { source: Source::Homeserver(source), error });
    }

    /// How long to wait before `source` is asked again; `None` passes it over. A timeout has cost enough time already.
    fn retry(&self, source: TransportSource, error: &RequestError) -> Option<Duration> {
        if matches!(source, TransportSource::Endpoint(_)) && !self.flagged {
            return None;
        }
        let backoff = *BACKOFF.get(self.failures)?;
        match error {
            RequestError::Network { .. } => Some(backoff),
            RequestError::RateLimited { retry_after } => {
                Some(retry_after.unwrap_or(backoff)).filter(|wait| *wait <= MAX_WAIT)
            }
            _ => None,
        }
    }
}

/// Merges entries that name one deployment: homeservers list one per generation of clients.
fn candidates(foci: impl Iterator<Item = (LiveKitFocus, NamedBy)>) -> Vec<Candidate> {
    let mut merged: Vec<Candidate> = Vec::new();
    for (focus, named_by) in foci {
        if let Some(known) = merged.iter_mut().find(|known| known.focus.is_same_as(&focus)) {
            known.focus.fill_from(&focus);
        } else if merged.len() < MAX_CANDIDATES {
            merged.push(Candidate { focus, named_by });
        }
    }
    merged
}

/// The foci that other members publish to, of the oldest member first. URLs of two members are never merged into one
/// focus: either of them could send our token elsewhere.
fn of_members(device: &Device, members: &[Member]) -> Vec<Candidate> {
    let mut others: Vec<&Member> = members.iter().filter(|m| m.device().as_ref() != Some(device)).collect();
    others.sort_by_key(|member| member.created);
    let mut found: Vec<Candidate> = Vec::new();
    for member in others {
        let Some(focus) = member.transports.iter().find_map(|transport| transport.livekit()) else {
            continue;
        };
        if let Some(Candidate { named_by: NamedBy::Members(users), .. }) =
            found.iter_mut().find(|known| known.focus == *focus)
        {
            if !users.contains(&member.user_id) {
                users.push(member.user_id.clone());
            }
        } else if found.len() < MAX_CANDIDATES {
            let named_by = NamedBy::Members(vec![member.user_id.clone()]);
            found.push(Candidate { focus: focus.clone(), named_by });
        }
    }
    found
}

/// Finds the foci that this device may publish to, of the first source that names any.
///
/// `support` is the answer to [`MatrixRequest::ReadSupport`], `members` are the joined members of the call.
///
/// # Errors
/// [`NoFocus`] with an account of all sources.
pub async fn discover(
    port: &dyn MatrixPort,
    options: &DiscoveryOptions,
    support: &ServerSupport,
    members: &[Member],
) -> Result<Discovered, NoFocus> {
    let mut discovery = Discovery::new(port.device(), options, support, members);
    loop {
        match discovery.next() {
            Next::Ask { after, source } => {
                tokio::time::sleep(after).await;
                let answer = match port.perform(MatrixRequest::Transports(source), REQUEST_TIMEOUT).await {
                    Ok(MatrixReply::Transports(foci)) => Ok(foci),
                    Ok(_) => Ok(Vec::new()),
                    Err(error) => Err(error),
                };
                tracing::debug!(source = %Source::Homeserver(source), ?answer, "asked for LiveKit foci");
                discovery.answered(answer);
            }
            Next::Found(discovered) => return Ok(discovered),
            Next::Nothing(nothing) => return Err(nothing),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        machine::testing::{device, focus, state_member},
        transport::Transport,
    };

    const UNSTABLE: TransportSource = TransportSource::Endpoint(ApiVersion::Unstable);
    const STABLE: TransportSource = TransportSource::Endpoint(ApiVersion::Stable);
    const WELL_KNOWN: TransportSource = TransportSource::WellKnown;

    fn discovery(options: &DiscoveryOptions, support: Option<ApiVersion>, members: &[Member]) -> Discovery {
        let support = ServerSupport { transports: support, ..ServerSupport::default() };
        Discovery::new(&device("@me:own.example", "D"), options, &support, members)
    }

    fn ask(source: TransportSource) -> Next {
        Next::Ask { after: Duration::ZERO, source }
    }

    fn refused(status: u16) -> RequestError {
        RequestError::Refused { status, errcode: String::new(), message: "<html>".to_owned() }
    }

    fn network() -> RequestError {
        RequestError::Network { cause: "502 Bad Gateway".to_owned() }
    }

    #[track_caller]
    fn found(discovery: &Discovery) -> (Source, Vec<String>) {
        let Next::Found(found) = discovery.next() else { panic!("{:?}", discovery.next()) };
        (found.source, found.candidates.iter().map(|c| c.focus.to_string()).collect())
    }

    #[test]
    fn application_focus_asks_nobody() {
        let options = DiscoveryOptions { focus: Some(focus("https://mine.example")), ..Default::default() };
        let discovery = discovery(&options, Some(ApiVersion::Stable), &[]);
        assert_eq!(found(&discovery), (Source::Option, vec!["https://mine.example".to_owned()]));
    }

    #[test]
    fn fallback_and_members_follow_the_homeservers_foci() {
        let options = DiscoveryOptions {
            fallback: ["https://own.example", "https://spare.example"].map(focus).into(),
            ..Default::default()
        };
        let mut other = state_member("@other:example.org", "D", 0);
        other.transports = vec![Transport::LiveKit(focus("https://theirs.example"))];
        let mut discovery = discovery(&options, None, &[other]);
        discovery.answered(Ok(vec![focus("https://own.example")]));
        let wanted = ["own", "spare", "theirs"].map(|name| format!("https://{name}.example"));
        assert_eq!(found(&discovery), (Source::Homeserver(UNSTABLE), wanted.to_vec()));
    }

    #[test]
    fn flags_decide_which_endpoints_are_asked() {
        for (support, order) in [
            (Some(ApiVersion::Stable), &[STABLE, UNSTABLE, WELL_KNOWN][..]),
            (Some(ApiVersion::Unstable), &[UNSTABLE, WELL_KNOWN]),
            (None, &[UNSTABLE, WELL_KNOWN]),
        ] {
            let mut discovery = discovery(&DiscoveryOptions::default(), support, &[]);
            for source in order {
                assert_eq!(discovery.next(), ask(*source), "{support:?}");
                discovery.answered(Err(RequestError::Unsupported));
            }
            assert!(matches!(discovery.next(), Next::Nothing(_)));
        }
    }

    #[test]
    fn unusable_answers_fall_through_to_well_known() {
        let answers = [
            Ok(Vec::new()),
            Err(RequestError::Unsupported),
            Err(RequestError::NotFound),
            Err(refused(404)),
            Err(refused(403)),
            Err(RequestError::TimedOut),
        ];
        for answer in answers {
            let mut discovery = discovery(&DiscoveryOptions::default(), Some(ApiVersion::Unstable), &[]);
            discovery.answered(answer.clone());
            assert_eq!(discovery.next(), ask(WELL_KNOWN), "{answer:?}");
            discovery.answered(Ok(vec![focus("https://jwt.example")]));
            let (source, foci) = found(&discovery);
            assert_eq!((source, foci[0].as_str()), (Source::Homeserver(WELL_KNOWN), "https://jwt.example"));
        }
    }

    #[test]
    fn passing_failure_of_flagged_endpoint_is_retried() {
        let mut discovery = discovery(&DiscoveryOptions::default(), Some(ApiVersion::Unstable), &[]);
        for wait in BACKOFF {
            discovery.answered(Err(network()));
            assert_eq!(discovery.next(), Next::Ask { after: wait, source: UNSTABLE });
        }
        discovery.answered(Err(network()));
        assert_eq!(discovery.next(), ask(WELL_KNOWN));
        let limited = |seconds| RequestError::RateLimited { retry_after: Some(Duration::from_secs(seconds)) };
        discovery.answered(Err(limited(5)));
        assert_eq!(discovery.next(), Next::Ask { after: Duration::from_secs(5), source: WELL_KNOWN });
        discovery.answered(Err(limited(3600)));
        assert!(matches!(discovery.next(), Next::Nothing(_)));
    }

    #[test]
    fn unflagged_endpoint_is_asked_once() {
        let mut discovery = discovery(&DiscoveryOptions::default(), None, &[]);
        discovery.answered(Err(network()));
        assert_eq!(discovery.next(), ask(WELL_KNOWN));
    }

    #[test]
    fn fallback_list_comes_before_members() {
        let options =
            DiscoveryOptions { fallback: vec![focus("https://fallback.example")], ..Default::default() };
        let members = [state_member("@a:x.example", "A", 1)];
        let mut discovery = discovery(&options, None, &members);
        discovery.answered(Ok(Vec::new()));
        discovery.answered(Ok(Vec::new()));
        assert_eq!(found(&discovery), (Source::Fallback, vec!["https://fallback.example".to_owned()]));
    }

    #[test]
    fn members_are_tried_oldest_first_without_ourselves() {
        let at = |user: &str, name: &str, created, url: &str| Member {
            transports: vec![Transport::LiveKit(focus(url))],
            ..state_member(user, name, created)
        };
        let members = [
            at("@young:y.example", "Y", 30, "https://y.example"),
            at("@me:own.example", "D", 1, "https://ghost.example"),
            at("@old:o.example", "O", 10, "https://o.example"),
            at("@middle:m.example", "M", 20, "https://o.example"),
            Member { transports: Vec::new(), ..state_member("@none:n.example", "N", 5) },
        ];
        let mut discovery = discovery(&DiscoveryOptions::default(), None, &members);
        discovery.answered(Ok(Vec::new()));
        discovery.answered(Ok(Vec::new()));
        assert_eq!(
            found(&discovery),
            (Source::Members, vec!["https://o.example".to_owned(), "https://y.example".to_owned()])
        );
        let Next::Found(discovered) = discovery.next() else { unreachable!() };
        let NamedBy::Members(users) = &discovered.candidates[0].named_by else { panic!("{discovered:?}") };
        assert_eq!(
            users.iter().map(|u| u.as_str()).collect::<Vec<_>>(),
            ["@old:o.example", "@middle:m.example"]
        );
        assert_eq!(discovered.passed_over.len(), 2);
    }

    #[test]
    fn entries_of_one_deployment_become_one_focus() {
        let service = focus("https://jwt.example");
        let both = LiveKitFocus { sfu: Some("wss://sfu.example".parse().unwrap()), ..service.clone() };
        let mut discovery = discovery(&DiscoveryOptions::default(), None, &[]);
        discovery.answered(Ok(vec![service, both.clone(), focus("https://second.example")]));
        let Next::Found(discovered) = discovery.next() else { panic!() };
        let foci: Vec<_> = discovered.candidates.into_iter().map(|c| c.focus).collect();
        assert_eq!(foci, [both, focus("https://second.example")]);
    }

    #[test]
    fn long_lists_are_cut() {
        let mut discovery = discovery(&DiscoveryOptions::default(), None, &[]);
        discovery.answered(Ok((0..100).map(|n| focus(&format!("https://s{n}.example"))).collect()));
        assert_eq!(found(&discovery).1.len(), MAX_CANDIDATES);
    }

    #[test]
    fn no_focus_names_every_source_and_the_remedy() {
        let mut discovery = discovery(&DiscoveryOptions::default(), None, &[]);
        discovery.answered(Ok(Vec::new()));
        discovery.answered(Err(RequestError::NotFound));
        let Next::Nothing(nothing) = discovery.next() else { panic!() };
        let text = nothing.to_string();
        for part in [
            "own.example",
            "/_matrix/client/unstable/org.matrix.msc4143/rtc/transports: names no usable LiveKit focus",
            "/.well-known/matrix/client: the homeserver does not know it (M_NOT_FOUND)",
            "the members of the call: names no usable",
            "CallOptions::focus",
        ] {
            assert!(text.contains(part), "{part} is missing in: {text}");
        }
    }

    #[test]
    fn logged_out_ends_discovery() {
        let options =
            DiscoveryOptions { fallback: vec![focus("https://fallback.example")], ..Default::default() };
        let mut discovery = discovery(&options, Some(ApiVersion::Stable), &[]);
        discovery.answered(Err(RequestError::LoggedOut));
        let Next::Nothing(nothing) = discovery.next() else { panic!() };
        assert!(nothing.to_string().contains("log in again"));
    }
}
