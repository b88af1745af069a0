//! A text encoder's weights: held, or let go and read again when a prompt asks for them. Of a large checkpoint they are
//! up to half, and no use while the cache serves.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::Result;
use crate::ops::Place;
use crate::weights::{Origin, Part};

/// An encoder that is read when it is first asked for.
pub(crate) struct Held<E> {
    origin: Origin,
    read: Box<Read<E>>,
    weight_bytes: usize,
    /// Whether it stays once it is read.
    kept: AtomicBool,
    state: Mutex<State<E>>,
}

/// What makes an encoder of its part.
type Read<E> = dyn Fn(&Part) -> Result<E> + Send + Sync;

struct State<E> {
    encoder: Option<Arc<E>>,
    /// The one that was read last, as long as anybody has it.
    latest: Weak<E>,
    reads: u64,
}

/// What can be said and done about weights, whatever encoder's they are.
pub(crate) trait HeldWeights: Send + Sync {
    /// About how many bytes they take once they are read.
    fn weight_bytes(&self) -> usize;

    /// About how many bytes they take now.
    fn held_bytes(&self) -> usize;

    /// Whether they are at hand.
    fn are_held(&self) -> bool;

    /// How often they were read.
    fn reads(&self) -> u64;

    /// Reads them if they are not at hand.
    fn read(&self) -> Result<()>;

    /// Reads them, and has them stay.
    fn keep(&self) -> Result<()>;

    /// Lets them go unless they are to stay; whether there was anything to let go.
    fn let_go(&self) -> bool;
}

impl<E: Send + Sync> Held<E> {
    /// What `read` makes of `part`, whose weights lie in files of `stem` and are to live at `place`.
    pub fn new(
        part: &Part,
        stem: &'static str,
        place: &Place,
        read: impl Fn(&Part) -> Result<E> + Send + Sync + 'static,
    ) -> Result<Self> {
        Ok(Self {
            origin: Origin::of(part, stem)?,
            read: Box::new(read),
            weight_bytes: part.weight_bytes(stem, place)?,
            kept: AtomicBool::new(false),
            state: Mutex::new(State { encoder: None, latest: Weak::new(), reads: 0 }),
        })
    }

    /// The encoder, read if it is not at hand.
    pub fn get(&self) -> Result<Arc<E>> {
        if let Some(encoder) = &self.lock().encoder {
            return Ok(Arc::clone(encoder));
        }
        // Nobody is locked out meanwhile: a thread of a pool that waits for its share of the reading may take up
        // other work of the pool, and that may ask for the same encoder.
        let encoder = Arc::new(self.origin.read(&self.read)?);
        let mut state = self.lock();
        state.reads += 1;
        let encoder = Arc::clone(state.encoder.get_or_insert(encoder));
        state.latest = Arc::downgrade(&encoder);
        Ok(encoder)
    }

    /// No code between lock and unlock can leave the state half changed.
    fn lock(&self) -> MutexGuard<'_, State<E>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<E: Send + Sync> HeldWeights for Held<E> {
    fn weight_bytes(&self) -> usize {
        self.weight_bytes
    }

    fn held_bytes(&self) -> usize {
        if self.lock().latest.strong_count() > 0 { self.weight_bytes } else { 0 }
    }

    fn are_held(&self) -> bool {
        self.lock().encoder.is_some()
    }

    fn reads(&self) -> u64 {
        self.lock().reads
    }

    fn read(&self) -> Result<()> {
        self.get().map(drop)
    }

    fn keep(&self) -> Result<()> {
        self.read()?;
        self.kept.store(true, Relaxed);
        Ok(())
    }

    fn let_go(&self) -> bool {
        !self.kept.load(Relaxed) && self.lock().encoder.take().is_some()
    }
}
