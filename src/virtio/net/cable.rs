//! Whether a card's cable is plugged in: what its driver sees as the state of the link.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::virtio::config_space::Fields;
use crate::virtio::spec::net;

/// A card's cable, plugged in at first. Virtio 1.3 §5.1.4.2.
#[derive(Debug)]
pub struct Cable {
    plugged: AtomicBool,
    config: Arc<Fields>,
    follower: Mutex<Option<Follower>>,
}

/// Who has packets pass, and not, in the place of the card's own workers.
struct Follower(Box<dyn Fn(bool) + Send>);

impl fmt::Debug for Follower {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Follower")
    }
}

impl Cable {
    pub(super) fn new(config: Arc<Fields>) -> Arc<Self> {
        Arc::new(Self {
            plugged: AtomicBool::new(true),
            config,
            follower: Mutex::default(),
        })
    }

    /// Has `follow` called with whether packets pass: now, and whenever that changes. It takes the place of whoever
    /// followed before.
    pub(super) fn follow(&self, follow: impl Fn(bool) + Send + 'static) {
        let mut follower = self.follower();
        follow(self.is_plugged());
        *follower = Some(Follower(Box::new(follow)));
    }

    fn follower(&self) -> MutexGuard<'_, Option<Follower>> {
        self.follower.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Plugs it in, or pulls it: then packets of both directions are lost, but for those that the driver sends by the
    /// host's kernel, which wait. The driver hears of it.
    pub fn plug(&self, plugged: bool) {
        let follower = self.follower();
        self.plugged.store(plugged, Ordering::Relaxed);
        if let Some(Follower(follow)) = &*follower {
            follow(plugged);
        }
        let status = if plugged { net::S_LINK_UP } else { 0 };
        self.config.set(net::CONFIG_STATUS, &status.to_le_bytes());
    }

    /// Whether packets pass.
    #[must_use]
    pub fn is_plugged(&self) -> bool {
        self.plugged.load(Ordering::Relaxed)
    }
}
