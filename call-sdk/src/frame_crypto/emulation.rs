//! Emulation prevention (H.264 §7.4.1): sealed bytes must not look like a start code.

const ESCAPE: u8 = 3;

/// Escapes `buffer` from `from` on. Earlier bytes do not count, not even as the start of a run of zeros, as in all
/// clients.
pub(super) fn escape(buffer: &mut Vec<u8>, from: usize, scratch: &mut Vec<u8>) {
    let Some(first) = find(&buffer[from..], |third| third <= ESCAPE) else { return };
    scratch.clear();
    scratch.extend_from_slice(&buffer[from + first..]);
    buffer.truncate(from + first);
    let mut rest = scratch.as_slice();
    while let Some(at) = find(rest, |third| third <= ESCAPE) {
        let (done, left) = rest.split_at(at + 2);
        buffer.extend_from_slice(done);
        buffer.push(ESCAPE);
        rest = left;
    }
    buffer.extend_from_slice(rest);
}

/// Removes escapes: returns `escaped` itself if it has none, else a copy in `scratch`, which is shorter.
pub(super) fn unescape<'a>(escaped: &'a [u8], scratch: &'a mut Vec<u8>) -> &'a [u8] {
    let is_escape = |third| third == ESCAPE;
    let Some(first) = find(escaped, is_escape) else { return escaped };
    scratch.clear();
    let (mut rest, mut at) = (escaped, Some(first));
    while let Some(position) = at {
        scratch.extend_from_slice(&rest[..position + 2]);
        rest = &rest[position + 3..];
        at = find(rest, is_escape);
    }
    scratch.extend_from_slice(rest);
    scratch
}

/// Position of the first two zeros followed by a byte that `matches`.
fn find(bytes: &[u8], matches: impl Fn(u8) -> bool) -> Option<usize> {
    /// Sealed bytes are random, so one block in a thousand has a pair of zeros. Searching for a pair first, one
    /// block at a time and without a branch per byte, is several times faster than a state machine.
    const BLOCK: usize = 64;
    let mut start = 0;
    while start + BLOCK < bytes.len() {
        let (block, shifted) = (&bytes[start..start + BLOCK], &bytes[start + 1..start + BLOCK + 1]);
        let pair = block.iter().zip(shifted).fold(false, |found, (a, b)| found | (a | b == 0));
        if pair && let Some(at) = find_slowly(bytes, start, start + BLOCK, &matches) {
            return Some(at);
        }
        start += BLOCK;
    }
    find_slowly(bytes, start, bytes.len(), &matches)
}

fn find_slowly(bytes: &[u8], from: usize, to: usize, matches: impl Fn(u8) -> bool) -> Option<usize> {
    (from..to.min(bytes.len().saturating_sub(2)))
        .find(|at| bytes[*at] == 0 && bytes[at + 1] == 0 && matches(bytes[at + 2]))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The rule as the standard states it, one byte at a time.
    fn reference(raw: &[u8]) -> Vec<u8> {
        let (mut out, mut zeros) = (Vec::new(), 0);
        for byte in raw {
            if *byte <= 3 && zeros >= 2 {
                out.push(3);
                zeros = 0;
            }
            out.push(*byte);
            zeros = if *byte == 0 { zeros + 1 } else { 0 };
        }
        out
    }

    fn mostly_zeros() -> impl Strategy<Value = Vec<u8>> {
        proptest::collection::vec(prop_oneof![4 => Just(0), 2 => 0..5u8, 1 => any::<u8>()], 0..400)
    }

    proptest! {
        #[test]
        fn escaping_follows_the_standard(raw in mostly_zeros(), from in 0..400usize) {
            let from = from.min(raw.len());
            let mut buffer = raw.clone();
            escape(&mut buffer, from, &mut Vec::new());
            prop_assert_eq!(&buffer[..from], &raw[..from]);
            prop_assert_eq!(&buffer[from..], reference(&raw[from..]));
        }

        #[test]
        fn unescaping_reverses_escaping(raw in mostly_zeros(), trailer in 4u8..) {
            let raw = [&raw[..], &[0x0c, trailer]].concat();
            let mut escaped = raw.clone();
            escape(&mut escaped, 0, &mut Vec::new());
            let mut scratch = Vec::new();
            prop_assert_eq!(unescape(&escaped, &mut scratch), &raw[..]);
        }

        #[test]
        fn unescaping_never_grows(bytes in mostly_zeros()) {
            let mut scratch = Vec::new();
            prop_assert!(unescape(&bytes, &mut scratch).len() <= bytes.len());
        }
    }

    #[test]
    fn megabyte_of_escapes_takes_no_more_memory_than_itself() {
        let escapes = [0, 0, 3].repeat(1 << 18);
        let mut scratch = Vec::with_capacity(escapes.len());
        let capacity = scratch.capacity();
        assert_eq!(unescape(&escapes, &mut scratch).len(), 2 << 18);
        assert_eq!(scratch.capacity(), capacity);
    }
}
