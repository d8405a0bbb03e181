//! Whether a card's cable is plugged in: what its driver sees as the state of the link.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::virtio::config_space::Fields;
use crate::virtio::spec::net;

/// A card's cable, plugged in at first. Virtio 1.3 §5.1.4.2.
#[derive(Debug)]
pub struct Cable {
    plugged: AtomicBool,
    config: Arc<Fields>,
}

impl Cable {
    pub(super) fn new(config: Arc<Fields>) -> Arc<Self> {
        Arc::new(Self {
            plugged: AtomicBool::new(true),
            config,
        })
    }

    /// Plugs it in, or pulls it: then packets of both directions are lost. The driver hears of it.
    pub fn plug(&self, plugged: bool) {
        self.plugged.store(plugged, Ordering::Relaxed);
        let status = if plugged { net::S_LINK_UP } else { 0 };
        self.config.set(net::CONFIG_STATUS, &status.to_le_bytes());
    }

    /// Whether packets pass.
    #[must_use]
    pub fn is_plugged(&self) -> bool {
        self.plugged.load(Ordering::Relaxed)
    }
}
