//! What a function does, counted where it happens, for whoever looks from another thread.
//!
//! Each function has its own, on cache lines of its own: no lock and no line is shared by two functions. A look takes
//! no lock either, for a function's is held while the kernel resets a device. The values are read one by one, so that
//! those of one look can be of different moments.

use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed};

/// By what a function interrupts its guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InterruptMode {
    /// By nothing.
    #[default]
    None,
    /// By its pin.
    Pin,
    /// By MSI.
    Msi,
    /// By MSI-X.
    Msix,
}

impl InterruptMode {
    /// All of them, in the order of their numbers.
    const ALL: [Self; 4] = [Self::None, Self::Pin, Self::Msi, Self::Msix];

    /// Its word in answers and tables.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Pin => "pin",
            Self::Msi => "msi",
            Self::Msix => "msi-x",
        }
    }
}

/// What is asked of a function by accesses that leave the guest, one exit each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Configuration space is read.
    ConfigRead,
    /// Configuration space is written.
    ConfigWrite,
    /// A BAR is read.
    BarRead,
    /// A BAR is written.
    BarWrite,
}

/// How often a function's accesses left the guest, and how it interrupts.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Activity {
    accesses: [AtomicU64; 4],
    mode: AtomicU8,
    connected: AtomicU32,
}

/// What a look at an [`Activity`] shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Reads of configuration space.
    pub config_reads: u64,
    /// Writes to configuration space.
    pub config_writes: u64,
    /// Reads of BARs.
    pub bar_reads: u64,
    /// Writes to BARs.
    pub bar_writes: u64,
    /// How it interrupts now.
    pub mode: InterruptMode,
    /// Vectors that have a way to the guest now; 1 for a pin.
    pub connected: u32,
}

impl Activity {
    /// An access of the guest's has come by an exit. Several vCPUs may do so at once.
    pub fn count(&self, access: Access) {
        if let Some(count) = self.accesses.get(access as usize) {
            count.fetch_add(1, Relaxed);
        }
    }

    /// The function interrupts by `mode` from now on, with so many vectors.
    pub fn interrupts_by(&self, mode: InterruptMode, connected: usize) {
        self.mode.store(mode as u8, Relaxed);
        let connected = u32::try_from(connected).unwrap_or(u32::MAX);
        self.connected.store(connected, Relaxed);
    }

    /// What there is now.
    #[must_use]
    pub fn seen(&self) -> Seen {
        let count = |access: Access| {
            let count = self.accesses.get(access as usize);
            count.map_or(0, |count| count.load(Relaxed))
        };
        let mode = InterruptMode::ALL.get(usize::from(self.mode.load(Relaxed)));
        Seen {
            config_reads: count(Access::ConfigRead),
            config_writes: count(Access::ConfigWrite),
            bar_reads: count(Access::BarRead),
            bar_writes: count(Access::BarWrite),
            mode: mode.copied().unwrap_or_default(),
            connected: self.connected.load(Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_is_seen_and_each_mode_is_told_from_the_others() {
        let activity = Activity::default();
        assert_eq!(activity.seen(), Seen::default());
        activity.count(Access::BarRead);
        activity.count(Access::BarRead);
        activity.count(Access::ConfigWrite);
        for mode in InterruptMode::ALL {
            activity.interrupts_by(mode, 3);
            let expected = Seen {
                config_writes: 1,
                bar_reads: 2,
                mode,
                connected: 3,
                ..Seen::default()
            };
            assert_eq!(activity.seen(), expected);
        }
    }
}
