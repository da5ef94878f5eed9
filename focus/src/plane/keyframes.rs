//! How often a publisher is asked for a key frame: many subscribers may want one, its encoder pays for each.

use std::time::{Duration, Instant};

use super::forward::MAX_LAYERS;

/// Least time between two requests for the lowest layer.
const LOWEST: Duration = Duration::from_millis(500);
/// Least time between two requests for any other layer: their key frames are larger.
const HIGHER: Duration = Duration::from_secs(1);

/// The throttle of one track, per layer. A request that comes too early is remembered, not lost.
#[derive(Debug, Default)]
pub(crate) struct KeyFrameGate {
    layers: [Gate; MAX_LAYERS],
}

#[derive(Clone, Copy, Debug, Default)]
struct Gate {
    asked: Option<Instant>,
    wanted: bool,
}

impl KeyFrameGate {
    /// Notes that somebody needs a key frame of a layer.
    pub(crate) fn want(&mut self, layer: u8) {
        if let Some(gate) = self.layers.get_mut(usize::from(layer)) {
            gate.wanted = true;
        }
    }

    /// The next layer whose key frame must be requested now; call until `None`.
    pub(crate) fn poll(&mut self, now: Instant) -> Option<u8> {
        for (layer, gate) in (0u8..).zip(&mut self.layers) {
            let pause = if layer == 0 { LOWEST } else { HIGHER };
            let due = gate.asked.is_none_or(|asked| now.saturating_duration_since(asked) >= pause);
            if gate.wanted && due {
                *gate = Gate { asked: Some(now), wanted: false };
                return Some(layer);
            }
        }
        None
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "virtual time begins somewhere")]
mod tests {
    use super::*;

    #[test]
    fn a_hurried_request_is_sent_when_its_time_comes() {
        let start = Instant::now();
        let mut gate = KeyFrameGate::default();
        gate.want(0);
        gate.want(1);
        assert_eq!(gate.poll(start), Some(0));
        assert_eq!(gate.poll(start), Some(1));
        assert_eq!(gate.poll(start), None);
        gate.want(0);
        gate.want(0);
        gate.want(1);
        assert_eq!(gate.poll(start + Duration::from_millis(499)), None);
        assert_eq!(gate.poll(start + Duration::from_millis(500)), Some(0));
        assert_eq!(gate.poll(start + Duration::from_millis(999)), None);
        assert_eq!(gate.poll(start + Duration::from_secs(1)), Some(1));
        assert_eq!(gate.poll(start + Duration::from_secs(9)), None);
    }

    #[test]
    fn a_layer_out_of_range_is_nothing() {
        let mut gate = KeyFrameGate::default();
        gate.want(200);
        assert_eq!(gate.poll(Instant::now()), None);
    }
}
