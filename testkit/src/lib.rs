//! What Antiphon's tests, demos and load tests run against. **Nothing here is for deployment.**
//!
//! * [`homeserver`]: a Matrix homeserver in this process, in memory, on loopback, that misbehaves when told to.
//! * [`peers`]: launchers of programs that others wrote: Synapse, a LiveKit server, Chromium, Element Call.
//! * [`media`]: synthetic frames by which a receiver knows what it got.

pub mod homeserver;
pub mod media;
pub mod peers;
