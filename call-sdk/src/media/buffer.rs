//! The bytes of frames, and a pool that reuses their memory.

use std::{fmt, ops::Deref, sync::Arc};

use bytes::Bytes;

/// The bytes of one frame. Clones share them.
///
/// Equality compares the bytes; `Debug` prints only how many there are, as frames are what calls keep secret.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct FrameBytes(Arc<Vec<u8>>);

impl Deref for FrameBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl AsRef<[u8]> for FrameBytes {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for FrameBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FrameBytes({} bytes)", self.len())
    }
}

impl From<Vec<u8>> for FrameBytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self(Arc::new(bytes))
    }
}

impl From<&[u8]> for FrameBytes {
    fn from(bytes: &[u8]) -> Self {
        bytes.to_vec().into()
    }
}

/// Copies, unless `bytes` is the only reference to the whole of its memory.
impl From<Bytes> for FrameBytes {
    fn from(bytes: Bytes) -> Self {
        Vec::from(bytes).into()
    }
}

/// Does not copy. The memory returns to its pool when the last slice of the `Bytes` is dropped.
impl From<FrameBytes> for Bytes {
    fn from(bytes: FrameBytes) -> Self {
        Self::from_owner(bytes)
    }
}

/// Buffers for frames, each reused as soon as the last clone of its [`FrameBytes`] is dropped.
///
/// A pool grows to the number of frames that exist at the same time, up to a limit, and from then on allocates
/// nothing: one pool serves all tracks of a call. A frame beyond the limit, or larger than the largest buffer that
/// is kept, gets memory of its own, freed with the frame.
///
/// ```
/// use std::convert::Infallible;
/// use antiphon_call_sdk::FramePool;
///
/// let mut pool = FramePool::default();
/// let filled = pool.fill(|buffer| {
///     buffer.clear();
///     buffer.extend_from_slice(b"a frame");
///     Ok::<_, Infallible>(())
/// });
/// let (frame, ()) = filled.unwrap();
/// assert_eq!(&frame[..], b"a frame");
/// ```
pub struct FramePool {
    buffers: Vec<Arc<Vec<u8>>>,
    most: usize,
    largest: usize,
}

impl FramePool {
    /// A pool that keeps up to `most` buffers of up to `largest` bytes each, and no other memory.
    #[must_use]
    pub fn new(most: usize, largest: usize) -> Self {
        Self { buffers: Vec::new(), most, largest }
    }

    /// Fills a buffer and returns it together with the result of `fill`.
    ///
    /// The buffer that `fill` receives still holds an earlier frame: `fill` must replace or clear it. It is not
    /// cleared here because overwriting a buffer of the right length is faster than growing an empty one, as
    /// [`FrameDecryptor::open`](crate::frame_crypto::FrameDecryptor::open) and
    /// [`FrameEncryptor::seal`](crate::frame_crypto::FrameEncryptor::seal) do.
    ///
    /// # Errors
    /// Those of `fill`; the buffer stays in the pool.
    pub fn fill<R, E>(
        &mut self,
        fill: impl FnOnce(&mut Vec<u8>) -> Result<R, E>,
    ) -> Result<(FrameBytes, R), E> {
        // The first free one, not the next in turn: few buffers are in use at a time, and they stay in the cache.
        let free = self.buffers.iter_mut().position(|buffer| Arc::get_mut(buffer).is_some());
        let place = match free {
            Some(place) => place,
            None if self.buffers.len() < self.most => {
                self.buffers.push(Arc::default());
                self.buffers.len() - 1
            }
            None => return fill_new(fill),
        };
        let Some(buffer) = Arc::get_mut(&mut self.buffers[place]) else { return fill_new(fill) };
        let filled = fill(buffer);
        let frame = if buffer.capacity() <= self.largest {
            Arc::clone(&self.buffers[place])
        } else {
            self.buffers.swap_remove(place)
        };
        filled.map(|result| (FrameBytes(frame), result))
    }
}

fn fill_new<R, E>(fill: impl FnOnce(&mut Vec<u8>) -> Result<R, E>) -> Result<(FrameBytes, R), E> {
    let mut buffer = Vec::new();
    let result = fill(&mut buffer)?;
    Ok((buffer.into(), result))
}

/// Keeps up to 64 buffers of up to 128 KiB, 8 MiB in all: some 40 tracks with a frame or two on their way each.
/// Key frames of large pictures exceed that; they are rare.
impl Default for FramePool {
    fn default() -> Self {
        Self::new(64, 128 * 1024)
    }
}

impl fmt::Debug for FramePool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FramePool")
            .field("buffers", &self.buffers.len())
            .field("most", &self.most)
            .field("largest", &self.largest)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    fn fill(pool: &mut FramePool, byte: u8, length: usize) -> FrameBytes {
        let filled = pool.fill(|buffer| {
            buffer.clear();
            buffer.resize(length, byte);
            Ok::<_, Infallible>(())
        });
        filled.unwrap().0
    }

    #[test]
    fn dropped_frame_returns_its_memory() {
        let mut pool = FramePool::new(4, 1000);
        let first = fill(&mut pool, 1, 100);
        let (memory, clone) = (first.as_ptr(), first.clone());
        drop(first);
        let second = fill(&mut pool, 2, 100);
        assert_ne!(second.as_ptr(), memory, "the clone still has it");
        assert_eq!(clone[..], [1; 100]);
        drop(clone);
        assert_eq!(fill(&mut pool, 3, 100).as_ptr(), memory);
        assert_eq!(second[..], [2; 100]);
    }

    #[test]
    fn bytes_share_memory_and_return_it() {
        let mut pool = FramePool::new(4, 1000);
        let frame = fill(&mut pool, 1, 100);
        let memory = frame.as_ptr();
        let part = Bytes::from(frame).slice(10..20);
        assert_eq!(part.as_ptr(), memory.wrapping_add(10));
        assert_ne!(fill(&mut pool, 2, 100).as_ptr(), memory);
        drop(part);
        assert_eq!(fill(&mut pool, 3, 100).as_ptr(), memory);
    }

    #[test]
    fn pool_keeps_no_more_buffers_than_allowed() {
        let mut pool = FramePool::new(3, 1000);
        let frames: Vec<_> = (0..10).map(|n| fill(&mut pool, n, 100)).collect();
        assert!((0..).zip(&frames).all(|(n, frame)| frame[..] == [n; 100]));
        assert_eq!(pool.buffers.len(), 3);
    }

    #[test]
    fn large_frame_is_not_kept() {
        let mut pool = FramePool::new(3, 1000);
        let small = fill(&mut pool, 1, 1000);
        let large = fill(&mut pool, 2, 1001);
        assert_eq!((small.len(), large[..].len()), (1000, 1001));
        assert_eq!(pool.buffers.len(), 1);
        assert_eq!(Arc::strong_count(&large.0), 1, "freed with the frame");
    }

    #[test]
    fn failed_fill_returns_its_error_and_keeps_the_buffer() {
        let mut pool = FramePool::new(3, 1000);
        let memory = fill(&mut pool, 1, 100).as_ptr();
        assert_eq!(pool.fill(|_| Err::<(), _>("refused")), Err("refused"));
        assert_eq!(fill(&mut pool, 2, 100).as_ptr(), memory);
    }

    #[test]
    fn debug_prints_no_byte_of_a_frame() {
        assert_eq!(format!("{:?}", FrameBytes::from(&[7; 3][..])), "FrameBytes(3 bytes)");
    }

    #[test]
    fn conversion_from_unique_bytes_does_not_copy() {
        let bytes = Bytes::from(vec![5; 100]);
        let memory = bytes.as_ptr();
        assert_eq!(FrameBytes::from(bytes).as_ptr(), memory);
        let shared = Bytes::from(vec![6; 100]);
        assert_eq!(FrameBytes::from(shared.slice(1..3))[..], [6; 2]);
    }
}
