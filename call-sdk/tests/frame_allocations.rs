//! Sealing and opening frames in pooled buffers allocates nothing once the buffers have grown. A binary of its own,
//! because it replaces the global allocator.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::disallowed_methods, reason = "a test needs some point in time to start from")]
#![allow(unsafe_code, reason = "the allocator's interface is unsafe")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    collections::VecDeque,
    time::Instant,
};

use antiphon_call_sdk::{
    Codec, FrameBytes, FramePool, KeyIndex, MediaKey,
    frame_crypto::{FrameDecryptor, FrameEncryptor, KeyRing, Opened},
};

/// The system's allocator, counting the allocations of each thread.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

fn count() {
    // A thread that is ending has no counter any more.
    let _ = ALLOCATIONS.try_with(|allocations| allocations.set(allocations.get() + 1));
}

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        unsafe { System.realloc(memory, layout, size) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const INDEX: KeyIndex = KeyIndex(3);
/// Opened frames that the application holds at a time.
const OUTSTANDING: usize = 8;

struct Path {
    encryptor: FrameEncryptor,
    decryptor: FrameDecryptor,
    sealed: FramePool,
    opened: FramePool,
    held: VecDeque<FrameBytes>,
    now: Instant,
}

impl Path {
    fn new(codec: Codec) -> Self {
        let ring = KeyRing::new();
        ring.set(INDEX, &MediaKey::new(vec![7; 32]).unwrap()).unwrap();
        Self {
            encryptor: FrameEncryptor::new(codec, ring.clone()).unwrap(),
            decryptor: FrameDecryptor::new(codec, ring).unwrap(),
            sealed: FramePool::new(2, 100_000),
            opened: FramePool::new(OUTSTANDING, 100_000),
            held: VecDeque::with_capacity(OUTSTANDING),
            now: Instant::now(),
        }
    }

    fn carry(&mut self, frame: &[u8]) {
        if self.held.len() == OUTSTANDING {
            self.held.pop_front();
        }
        let (wire, ()) = self.sealed.fill(|out| self.encryptor.seal(INDEX, frame, out)).unwrap();
        let opened = self.opened.fill(|out| self.decryptor.open(self.now, &wire, None, out));
        let (plain, outcome) = opened.unwrap();
        assert_eq!((&plain[..], outcome), (frame, Opened::Frame(INDEX)));
        self.held.push_back(plain);
    }
}

#[test]
fn frames_in_pooled_buffers_allocate_nothing_in_the_steady_state() {
    for codec in [Codec::Opus, Codec::Vp8, Codec::Vp9] {
        let frames = [80, 1200, 20_000].map(|size| vec![0x31; size]);
        let mut path = Path::new(codec);
        let mut run = |rounds| (0..rounds).for_each(|_| frames.iter().for_each(|frame| path.carry(frame)));
        let before = ALLOCATIONS.get();
        // More frames than the replay window holds.
        run(1500);
        let growing = ALLOCATIONS.get() - before;
        assert!(growing > OUTSTANDING as u64, "the counter counts: {growing}");
        run(1500);
        assert_eq!(ALLOCATIONS.get() - before - growing, 0, "{codec:?}");
    }
}
