//! Whether this process can reach anything but itself.

use std::fs;

/// Whether no address but loopback exists here: libwebrtc and most SFUs gather, bind and announce every address
/// of every interface, so whatever runs them must run where there is none (`unshare -n`, `ip link set lo up`).
///
/// Read from `/proc/self/net`, which follows the process into its namespace; `/sys/class/net` shows the
/// namespace in which `/sys` was mounted.
pub fn only_loopback() -> bool {
    let Ok(interfaces) = fs::read_to_string("/proc/self/net/dev") else { return false };
    if !has_interfaces_besides_lo(&interfaces) {
        return true;
    }
    // Some kernels put idle tunnel interfaces into every namespace: what counts is an address.
    let Ok(routes) = fs::read_to_string("/proc/self/net/fib_trie") else { return false };
    // The file is absent where IPv6 is switched off.
    let ipv6 = fs::read_to_string("/proc/self/net/if_inet6").unwrap_or_default();
    !has_ipv4_besides_loopback(&routes) && !has_ipv6_besides_lo(&ipv6)
}

fn has_interfaces_besides_lo(dev: &str) -> bool {
    dev.lines().filter_map(|line| line.split_once(':')).any(|(name, _)| name.trim() != "lo")
}

fn has_ipv4_besides_loopback(fib_trie: &str) -> bool {
    let mut address = "";
    fib_trie.lines().any(|line| {
        if let Some((_, leaf)) = line.split_once("|-- ") {
            address = leaf;
        }
        line.ends_with("host LOCAL") && !address.starts_with("127.")
    })
}

fn has_ipv6_besides_lo(if_inet6: &str) -> bool {
    if_inet6.lines().filter_map(|line| line.split_whitespace().last()).any(|name| name != "lo")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEV_LO: &str = "Inter-|   Receive                |  Transmit
 face |bytes    packets errs drop |bytes    packets
    lo:       0       0    0    0        0       0
";
    const TRIE_LO: &str = "Local:
  +-- 127.0.0.0/8 2 0 2
     +-- 127.0.0.0/31 1 0 0
        |-- 127.0.0.0
           /8 host LOCAL
        |-- 127.0.0.1
           /32 host LOCAL
     |-- 127.255.255.255
        /32 link BROADCAST
";

    #[test]
    fn a_namespace_with_lo_alone_is_loopback_only() {
        assert!(!has_interfaces_besides_lo(DEV_LO));
        assert!(!has_ipv4_besides_loopback(TRIE_LO));
        assert!(!has_ipv6_besides_lo("00000000000000000000000000000001 01 80 10 80       lo\n"));
    }

    #[test]
    fn an_interface_with_an_address_is_seen() {
        assert!(has_interfaces_besides_lo(&format!(
            "{DEV_LO}  eth0:       0       0    0    0        0       0\n"
        )));
        let routes = format!(
            "{TRIE_LO}     +-- 192.0.2.0/30 2 0 2\n        |-- 192.0.2.2\n           /32 host LOCAL\n"
        );
        assert!(has_ipv4_besides_loopback(&routes));
        assert!(has_ipv6_besides_lo("fe800000000000000000000000000001 02 40 20 80     eth0\n"));
    }
}
