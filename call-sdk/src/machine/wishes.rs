//! What the connections that carry a local track ask of its encoder, as one wish: there is one encoder.

use std::collections::{BTreeMap, BTreeSet};

use crate::transport::ConnectionId;

/// The latest wishes for one local track, and what the encoder was told.
#[derive(Debug, Default)]
pub(crate) struct Wishes {
    targets: BTreeMap<ConnectionId, u64>,
    layers: BTreeMap<ConnectionId, Vec<bool>>,
    told_target: Option<u64>,
    told_layers: Option<Vec<bool>>,
}

impl Wishes {
    /// A connection carries so many bits per second.
    pub(crate) fn carries(&mut self, connection: ConnectionId, bits_per_second: u64) {
        self.targets.insert(connection, bits_per_second);
    }

    /// A connection wants these layers.
    pub(crate) fn wants(&mut self, connection: ConnectionId, layers: Vec<bool>) {
        self.layers.insert(connection, layers);
    }

    /// A connection has ended.
    pub(crate) fn forget(&mut self, connection: ConnectionId) {
        self.targets.remove(&connection);
        self.layers.remove(&connection);
    }

    /// The target of the encoder, if it is new: what the narrowest connection carries, or the widest if the track has
    /// layers, because each connection chooses among those. Connections that are too narrow for any video (`paused`)
    /// do not count beside others.
    pub(crate) fn new_target(&mut self, is_layered: bool, paused: &BTreeSet<ConnectionId>) -> Option<u64> {
        let counted = |counts: &dyn Fn(&ConnectionId) -> bool| {
            let targets = self.targets.iter().filter(|(of, _)| counts(of)).map(|(_, target)| *target);
            if is_layered { targets.max() } else { targets.min() }
        };
        let target = counted(&|of| !paused.contains(of)).or_else(|| counted(&|_| true));
        if target == self.told_target {
            return None;
        }
        self.told_target = target;
        target
    }

    /// The layers that any of `connections` wants, if that is new. One that has not said wants all.
    pub(crate) fn new_layers(&mut self, connections: &BTreeSet<ConnectionId>) -> Option<Vec<bool>> {
        let count = self.layers.values().map(Vec::len).max()?;
        let silent = connections.iter().any(|connection| !self.layers.contains_key(connection));
        let is_wanted = |layer: usize| {
            silent || self.layers.values().any(|layers| layers.get(layer).is_some_and(|wanted| *wanted))
        };
        let layers: Vec<bool> = (0..count).map(is_wanted).collect();
        if self.told_layers.as_ref() == Some(&layers) {
            return None;
        }
        self.told_layers = Some(layers.clone());
        Some(layers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOBODY: BTreeSet<ConnectionId> = BTreeSet::new();

    fn connection(route: u32) -> ConnectionId {
        ConnectionId { route, generation: 0 }
    }

    #[test]
    fn one_encoder_serves_the_narrowest_connection_unless_there_are_layers() {
        let mut wishes = Wishes::default();
        wishes.carries(connection(1), 900);
        assert_eq!(wishes.new_target(false, &NOBODY), Some(900));
        wishes.carries(connection(2), 300);
        assert_eq!(wishes.new_target(false, &NOBODY), Some(300));
        assert_eq!(wishes.new_target(false, &NOBODY), None);
        assert_eq!(wishes.new_target(true, &NOBODY), Some(900));
        assert_eq!(wishes.new_target(false, &[connection(1)].into()), Some(300));
        assert_eq!(wishes.new_target(false, &[connection(2)].into()), Some(900), "it gets no video");
        wishes.carries(connection(1), 500);
        assert_eq!(wishes.new_target(false, &NOBODY), Some(300));
        wishes.forget(connection(2));
        assert_eq!(wishes.new_target(false, &NOBODY), Some(500), "the narrow one has left");
    }

    #[test]
    fn layer_is_wanted_while_any_connection_wants_it_or_has_not_said() {
        let mut wishes = Wishes::default();
        let both = BTreeSet::from([connection(1), connection(2)]);
        assert_eq!(wishes.new_layers(&both), None);
        wishes.wants(connection(1), vec![true, false]);
        assert_eq!(wishes.new_layers(&both), Some(vec![true, true]));
        wishes.wants(connection(2), vec![true, false]);
        assert_eq!(wishes.new_layers(&both), Some(vec![true, false]));
        wishes.wants(connection(1), vec![false, true]);
        assert_eq!(wishes.new_layers(&both), Some(vec![true, true]));
        wishes.forget(connection(2));
        assert_eq!(wishes.new_layers(&[connection(1)].into()), Some(vec![false, true]));
    }
}
