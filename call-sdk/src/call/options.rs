//! How to join a call.

use std::time::Duration;

use zeroize::Zeroizing;

use crate::{
    foci::ServicePolicy,
    machine::{
        Attention, EncryptionPolicy, HealingConfig, MachineConfig, MembershipMode, MeshPolicy, OwnConfig,
        RolloutConfig,
    },
    matrix::{MatrixPort, TrustPolicy},
    member::Slot,
    tls::TlsOptions,
    transport::LiveKitFocus,
};

/// How to join. `CallOptions::default()` is what Element Call does in its compatibility mode, with stricter trust.
#[derive(Clone)]
#[non_exhaustive]
pub struct CallOptions {
    /// Which call of the room; `None`: the one that the room uses, `m.call#ROOM` if there is none yet.
    pub slot: Option<Slot>,
    /// The membership form that we write.
    pub mode: MembershipMode,
    /// `audio`, `video` or another, shown by other clients.
    pub intent: Option<String>,
    /// Whether to ring or notify the room when we start a call, being the first (MSC4075).
    pub invite: Option<Attention>,
    /// Whether an unencrypted call is acceptable.
    pub encryption: EncryptionPolicy,
    /// Which devices get our key and may send us theirs.
    pub trust: TrustPolicy,
    /// Join although our own device is not cross-signed.
    pub allow_untrusted: bool,
    /// A password that all members share instead of a key per member. Redacted and wiped.
    pub password: Option<Zeroizing<String>>,
    /// The focus to publish to, instead of the homeserver's.
    pub focus: Option<LiveKitFocus>,
    /// Foci for homeservers that name none, or whose foci are down.
    pub fallback_foci: Vec<LiveKitFocus>,
    /// Which authorisation services get our OpenID tokens, and which addresses are connected to.
    pub services: ServicePolicy,
    /// The certificate authorities that are trusted.
    pub tls: TlsOptions,
    /// The local addresses that media travels from.
    #[cfg(feature = "webrtc")]
    pub bind: crate::transport::livekit::Bind,
    /// STUN and TURN servers in addition to those that SFUs name.
    #[cfg(feature = "webrtc")]
    pub ice_servers: Vec<crate::transport::livekit::IceServer>,
    /// Whether media travels through TURN servers only, so that neither SFUs nor members learn our address.
    pub relay_only: bool,
    /// When the call does without a focus.
    pub mesh: MeshPolicy,
    /// Most members of a call that goes on without its focus, ourselves included.
    pub mesh_most: usize,
    /// Whether members learn the addresses of our network interfaces in a mesh: for local networks and VPNs, where
    /// nobody needs a STUN or TURN server. Loopback addresses are told in any case.
    pub host_candidates: bool,
    /// Whether the focus's authorisation service is asked to keep our delayed leave (MSC4195) and send it when
    /// the SFU loses this device.
    pub delegate_leave: bool,
    /// Frames that may wait for the application before new ones are dropped.
    pub frame_queue: usize,
    /// How long joining may take.
    pub join_timeout: Duration,
    /// Timing of our own membership.
    pub membership: OwnConfig,
    /// Timing of our own media key.
    pub keys: RolloutConfig,
    /// When members that cannot read each other send their keys again.
    pub healing: HealingConfig,
}

impl Default for CallOptions {
    fn default() -> Self {
        Self {
            slot: None,
            mode: MembershipMode::default(),
            intent: None,
            invite: None,
            encryption: EncryptionPolicy::default(),
            trust: TrustPolicy::default(),
            allow_untrusted: false,
            password: None,
            focus: None,
            fallback_foci: Vec::new(),
            services: ServicePolicy::default(),
            tls: TlsOptions::default(),
            #[cfg(feature = "webrtc")]
            bind: crate::transport::livekit::Bind::default(),
            #[cfg(feature = "webrtc")]
            ice_servers: Vec::new(),
            relay_only: false,
            mesh: MeshPolicy::default(),
            mesh_most: MachineConfig::DEFAULT_MESH_MOST,
            host_candidates: false,
            delegate_leave: false,
            frame_queue: 1024,
            join_timeout: Duration::from_secs(30),
            membership: OwnConfig::default(),
            keys: RolloutConfig::default(),
            healing: HealingConfig::default(),
        }
    }
}

/// One setter per option, for chaining.
macro_rules! setters {
    ($($(#[$doc:meta])* $name:ident($field:ident: $type:ty);)*) => {
        impl CallOptions {
            $($(#[$doc])*
            #[must_use]
            pub fn $name(mut self, $field: $type) -> Self {
                self.$field = $field.into();
                self
            })*
        }
    };
}

setters! {
    /// Chooses the call of the room.
    with_slot(slot: Slot);
    /// Chooses the membership form that we write.
    with_mode(mode: MembershipMode);
    /// States an intent.
    with_intent(intent: String);
    /// Rings or notifies the room when we start a call.
    with_invite(invite: Attention);
    /// Says whether an unencrypted call is acceptable.
    with_encryption(encryption: EncryptionPolicy);
    /// Says which devices get our key.
    with_trust(trust: TrustPolicy);
    /// Joins although our own device is not cross-signed.
    with_allow_untrusted(allow_untrusted: bool);
    /// Uses a shared password.
    with_password(password: Zeroizing<String>);
    /// Publishes to this focus.
    with_focus(focus: LiveKitFocus);
    /// Names foci for homeservers that name none.
    with_fallback_foci(fallback_foci: Vec<LiveKitFocus>);
    /// Says which authorisation services get our OpenID tokens.
    with_services(services: ServicePolicy);
    /// Says which certificate authorities are trusted.
    with_tls(tls: TlsOptions);
    /// Sends media through TURN servers only.
    with_relay_only(relay_only: bool);
    /// Says when the call does without a focus.
    with_mesh(mesh: MeshPolicy);
    /// Bounds the calls that go on without their focus.
    with_mesh_most(mesh_most: usize);
    /// Tells members the addresses of our network interfaces in a mesh.
    with_host_candidates(host_candidates: bool);
    /// Delegates our delayed leave.
    with_delegate_leave(delegate_leave: bool);
    /// Bounds the frames that wait.
    with_frame_queue(frame_queue: usize);
    /// Bounds how long joining takes.
    with_join_timeout(join_timeout: Duration);
    /// Changes the timing of our own membership.
    with_membership(membership: OwnConfig);
    /// Changes the timing of our own media key.
    with_keys(keys: RolloutConfig);
    /// Changes when members that cannot read each other send their keys again.
    with_healing(healing: HealingConfig);
}

impl CallOptions {
    /// Chooses the local addresses that media travels from.
    #[cfg(feature = "webrtc")]
    #[must_use]
    pub fn with_bind(mut self, bind: crate::transport::livekit::Bind) -> Self {
        self.bind = bind;
        self
    }

    /// Adds STUN and TURN servers to those that SFUs name.
    #[cfg(feature = "webrtc")]
    #[must_use]
    pub fn with_ice_servers(mut self, ice_servers: Vec<crate::transport::livekit::IceServer>) -> Self {
        self.ice_servers = ice_servers;
        self
    }

    /// The part that is about LiveKit SFUs.
    #[cfg(feature = "webrtc")]
    #[must_use]
    pub fn livekit(&self) -> super::LiveKitOptions {
        let mut livekit = super::LiveKitOptions::default();
        livekit.discovery.focus.clone_from(&self.focus);
        livekit.discovery.fallback.clone_from(&self.fallback_foci);
        livekit.policy = self.services;
        livekit.tls = self.tls.clone();
        livekit.bind = self.bind.clone();
        livekit.ice_servers.clone_from(&self.ice_servers);
        livekit.relay_only = self.relay_only;
        livekit.host_candidates = self.host_candidates;
        livekit
    }

    pub(super) fn machine_config(&self, port: &dyn MatrixPort, observe: bool) -> MachineConfig {
        let mut config = MachineConfig::new(port.device().clone(), port.room_id().to_owned());
        config.slot.clone_from(&self.slot);
        config.mode = self.mode;
        config.intent.clone_from(&self.intent);
        config.invite = self.invite;
        config.encryption = self.encryption;
        config.trust = port.trust();
        config.shared_password = self.password.is_some();
        config.delegate_leave = self.delegate_leave;
        config.mesh = self.mesh;
        config.mesh_most = self.mesh_most;
        config.observe = observe;
        config.membership = self.membership.clone();
        config.keys = self.keys.clone();
        config.healing = self.healing.clone();
        config
    }
}

impl std::fmt::Debug for CallOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CallOptions")
            .field("slot", &self.slot)
            .field("mode", &self.mode)
            .field("intent", &self.intent)
            .field("encryption", &self.encryption)
            .field("trust", &self.trust)
            .field("password", &self.password.as_ref().map(|_| "redacted"))
            .field("focus", &self.focus)
            .field("delegate_leave", &self.delegate_leave)
            .finish_non_exhaustive()
    }
}
