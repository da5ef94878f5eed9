//! What the connections that carry a local track ask of its encoder, as one wish: there is one encoder.

use std::collections::BTreeMap;

use crate::transport::ConnectionId;

/// The latest wishes for one local track.
#[derive(Debug, Default)]
pub(crate) struct Wishes {
    targets: BTreeMap<ConnectionId, u64>,
    layers: BTreeMap<ConnectionId, Vec<bool>>,
}

impl Wishes {
    /// A connection carries so many bits per second. Returns the target of the encoder: what the narrowest connection
    /// carries, or the widest if the track has layers, because each connection chooses among those.
    pub(crate) fn target(&mut self, connection: ConnectionId, bits_per_second: u64, is_layered: bool) -> u64 {
        self.targets.insert(connection, bits_per_second);
        let targets = self.targets.values().copied();
        if is_layered { targets.max() } else { targets.min() }.unwrap_or(bits_per_second)
    }

    /// A connection wants these layers. Returns those that any connection wants.
    pub(crate) fn layers_wanted(&mut self, connection: ConnectionId, layers: Vec<bool>) -> Vec<bool> {
        let mut wanted = layers.clone();
        self.layers.insert(connection, layers);
        for layers in self.layers.values() {
            for (any, one) in wanted.iter_mut().zip(layers) {
                *any |= one;
            }
        }
        wanted
    }

    /// A connection has ended.
    pub(crate) fn forget(&mut self, connection: ConnectionId) {
        self.targets.remove(&connection);
        self.layers.remove(&connection);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection(route: u32) -> ConnectionId {
        ConnectionId { route, generation: 0 }
    }

    #[test]
    fn one_encoder_serves_the_narrowest_connection_unless_there_are_layers() {
        let mut wishes = Wishes::default();
        assert_eq!(wishes.target(connection(1), 900, false), 900);
        assert_eq!(wishes.target(connection(2), 300, false), 300);
        assert_eq!(wishes.target(connection(1), 800, true), 800);
        wishes.forget(connection(2));
        assert_eq!(wishes.target(connection(1), 700, false), 700);
    }

    #[test]
    fn layer_is_wanted_while_any_connection_wants_it() {
        let mut wishes = Wishes::default();
        assert_eq!(wishes.layers_wanted(connection(1), vec![true, false]), [true, false]);
        assert_eq!(wishes.layers_wanted(connection(2), vec![false, true]), [true, true]);
        wishes.forget(connection(1));
        assert_eq!(wishes.layers_wanted(connection(2), vec![false, true]), [false, true]);
    }
}
