//! Telling the device where its interrupts go: MSI and MSI-X over `VFIO_DEVICE_SET_IRQS`.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use busway_pci::VectorOwner;

use crate::{DeviceIo, IrqError, IrqIndex};

/// MSI's vectors, which are enabled all at once.
#[derive(Debug)]
pub(crate) struct MsiVectors {
    name: String,
    io: Arc<dyn DeviceIo>,
}

impl MsiVectors {
    pub(crate) fn new(name: &str, io: Arc<dyn DeviceIo>) -> Self {
        Self {
            name: name.to_owned(),
            io,
        }
    }
}

impl VectorOwner for MsiVectors {
    fn connect(&mut self, first: u16, events: &[BorrowedFd<'_>]) -> io::Result<()> {
        let events: Vec<_> = events.iter().copied().map(Some).collect();
        let set = |events| self.io.set_irqs(IrqIndex::Msi, first.into(), events);
        match set(&events) {
            // The device is told the number it gets, and makes do with it; the guest's other
            // vectors stay silent. PCIe 6.0 §7.7.1.2
            Err(IrqError::Fewer { given }) if given > 0 => {
                let asked = events.len();
                log::warn!(
                    "{}: the host gives it {given} of the {asked} MSI vectors that its driver \
                     enabled; a host with interrupt remapping gives more",
                    self.name
                );
                set(events.get(..given as usize).unwrap_or_default()).map_err(io::Error::other)
            }
            result => result.map_err(io::Error::other),
        }
    }

    fn disconnect_all(&mut self) {
        disable(&self.name, &*self.io, IrqIndex::Msi);
    }
}

/// MSI-X's vectors, which are connected one by one.
///
/// Where the kernel can add vectors to those in use, each costs the host a vector when it is
/// connected and not before. An older kernel fixes the number when MSI-X is enabled: it is given the
/// whole table then, with no eventfd but the first's, so that later vectors are only connected, and
/// what has none costs the host no interrupt line.
///
/// A host that cannot give that many gets what is needed, and MSI-X is disabled and enabled again
/// with more each time. What the device sends in that window is lost to the kernel; every vector that
/// was connected is therefore signalled once when the window closes. A driver finds nothing to do, or
/// what it would have missed.
#[derive(Debug)]
pub(crate) struct MsixVectors {
    name: String,
    io: Arc<dyn DeviceIo>,
    /// How many the kernel has set up, zero while MSI-X is disabled there.
    enabled: u32,
    /// The connected ones' eventfds, by vector, where they may be needed again.
    kept: Vec<Option<OwnedFd>>,
}

impl MsixVectors {
    pub(crate) fn new(name: &str, io: Arc<dyn DeviceIo>) -> Self {
        Self {
            name: name.to_owned(),
            io,
            enabled: 0,
            kept: Vec::new(),
        }
    }

    fn set(&self, first: u32, events: &[Option<BorrowedFd<'_>>]) -> Result<(), IrqError> {
        self.io.set_irqs(IrqIndex::Msix, first, events)
    }

    /// Enables MSI-X with no vector connected.
    fn enable(&mut self, resizable: bool, count: u32) -> Result<(), IrqError> {
        let empty = vec![None; count as usize];
        // One vector, without an eventfd, is the least that enabling takes.
        let enabled = if resizable { 1 } else { count };
        self.set(0, empty.get(..enabled as usize).unwrap_or_default())?;
        self.enabled = enabled;
        Ok(())
    }

    fn connect_more(&mut self, first: u32, events: &[Option<BorrowedFd<'_>>]) -> io::Result<()> {
        let info = self.io.irq(IrqIndex::Msix);
        let end = first.saturating_add(events.len() as u32);
        if end > info.count {
            return Err(io::Error::other(format!(
                "the host knows of {} vectors",
                info.count
            )));
        }
        if self.enabled == 0 && !(info.resizable && first == 0) {
            match self.enable(info.resizable, info.count) {
                Ok(()) => {}
                Err(IrqError::Fewer { given }) => {
                    log::info!(
                        "{}: the host can give {given} of {} MSI-X vectors; adding them as they \
                         are needed",
                        self.name,
                        info.count
                    );
                }
                Err(error) => return Err(io::Error::other(error)),
            }
        }
        if info.resizable || end <= self.enabled {
            self.set(first, events).map_err(io::Error::other)?;
            self.enabled = self.enabled.max(end);
            return Ok(());
        }
        self.enable_again(first, events)
    }

    /// Enables MSI-X anew with room for the vectors from `first` on, and every connected one.
    fn enable_again(&mut self, first: u32, events: &[Option<BorrowedFd<'_>>]) -> io::Result<()> {
        disable(&self.name, &*self.io, IrqIndex::Msix);
        let before: Vec<_> = self
            .kept
            .iter()
            .map(|event| event.as_ref().map(AsFd::as_fd))
            .collect();
        let first = first as usize;
        let mut all = before.clone();
        all.resize(all.len().max(first.saturating_add(events.len())), None);
        for (slot, event) in all.iter_mut().skip(first).zip(events) {
            *slot = *event;
        }
        let result = self.set(0, &all);
        let enabled = if result.is_ok() {
            all.len()
        } else if self.set(0, &before).is_ok() {
            before.len()
        } else {
            0
        };
        for event in self.kept.iter().flatten() {
            signal(event);
        }
        self.enabled = enabled as u32;
        result.map_err(io::Error::other)
    }
}

impl VectorOwner for MsixVectors {
    fn connect(&mut self, first: u16, events: &[BorrowedFd<'_>]) -> io::Result<()> {
        let set: Vec<_> = events.iter().copied().map(Some).collect();
        self.connect_more(first.into(), &set)?;
        let info = self.io.irq(IrqIndex::Msix);
        if !info.resizable && self.enabled < info.count {
            let first = usize::from(first);
            let end = first.saturating_add(events.len());
            if self.kept.len() < end {
                self.kept.resize_with(end, || None);
            }
            for (slot, event) in self.kept.iter_mut().skip(first).zip(events) {
                *slot = Some(event.try_clone_to_owned()?);
            }
        }
        Ok(())
    }

    fn disconnect_all(&mut self) {
        self.kept.clear();
        if std::mem::take(&mut self.enabled) > 0 {
            disable(&self.name, &*self.io, IrqIndex::Msix);
        }
    }
}

fn disable(name: &str, io: &dyn DeviceIo, index: IrqIndex) {
    if let Err(error) = io.disable_irqs(index) {
        // A device that was pulled out has none any more.
        log::debug!("{name}: {index:?} cannot be disabled: {error}");
    }
}

/// Signals an eventfd: adds one. eventfd(2)
fn signal(event: &OwnedFd) {
    let written = event
        .try_clone()
        .map(File::from)
        .and_then(|mut file| file.write_all(&1_u64.to_ne_bytes()));
    if let Err(error) = written {
        log::debug!("eventfd: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{FakeDevice, eventfd, signals};
    use crate::{IrqInfo, fake::IrqCall};

    fn device(count: u32, resizable: bool) -> Arc<FakeDevice> {
        Arc::new(FakeDevice {
            msix: IrqInfo { count, resizable },
            ..FakeDevice::default()
        })
    }

    #[test]
    fn with_a_kernel_that_can_add_vectors_each_is_one_call_and_none_is_disturbed() {
        let fake = device(8, true);
        let mut vectors = MsixVectors::new("fake", fake.clone());
        let [a, b, c] = [eventfd(), eventfd(), eventfd()];
        vectors.connect(5, &[a.as_fd()]).unwrap();
        vectors.connect(0, &[b.as_fd()]).unwrap();
        vectors.connect(2, &[c.as_fd()]).unwrap();
        vectors.disconnect_all();
        use IrqCall::{Disable, Set};
        let msix = IrqIndex::Msix;
        assert_eq!(
            fake.irq_calls(),
            [
                Set(msix, 0, vec![false]),
                Set(msix, 5, vec![true]),
                Set(msix, 0, vec![true]),
                Set(msix, 2, vec![true]),
                Disable(msix),
            ]
        );
        assert_eq!([&a, &b, &c].map(signals), [0, 0, 0]);
    }

    #[test]
    fn an_older_kernel_is_given_room_for_the_whole_table_once() {
        let fake = device(4, false);
        let mut vectors = MsixVectors::new("fake", fake.clone());
        let [a, b] = [eventfd(), eventfd()];
        vectors.connect(1, &[a.as_fd()]).unwrap();
        vectors.connect(3, &[b.as_fd()]).unwrap();
        use IrqCall::Set;
        let msix = IrqIndex::Msix;
        assert_eq!(
            fake.irq_calls(),
            [
                Set(msix, 0, vec![false; 4]),
                Set(msix, 1, vec![true]),
                Set(msix, 3, vec![true]),
            ]
        );
        assert!(vectors.kept.is_empty());
    }

    #[test]
    fn a_host_short_of_vectors_loses_no_interrupt_when_one_is_added() {
        let fake = Arc::new(FakeDevice {
            msix: IrqInfo {
                count: 8,
                resizable: false,
            },
            most_vectors: 4,
            ..FakeDevice::default()
        });
        let mut vectors = MsixVectors::new("fake", fake.clone());
        let [a, b, c] = [eventfd(), eventfd(), eventfd()];
        vectors.connect(0, &[a.as_fd()]).unwrap();
        vectors.connect(3, &[b.as_fd()]).unwrap();
        assert_eq!(fake.connected(), [true, false, false, true]);
        assert_eq!([&a, &b].map(signals), [1, 0]);
        // The fifth is too many; the others go on.
        assert!(vectors.connect(4, &[c.as_fd()]).is_err());
        assert_eq!(fake.connected(), [true, false, false, true]);
        assert_eq!([&a, &b, &c].map(signals), [1, 1, 0]);
    }

    #[test]
    fn msi_makes_do_with_fewer_vectors() {
        let fake = Arc::new(FakeDevice {
            msi: IrqInfo {
                count: 4,
                resizable: false,
            },
            most_vectors: 1,
            ..FakeDevice::default()
        });
        let mut vectors = MsiVectors::new("fake", fake.clone());
        let events = [eventfd(), eventfd()];
        let events: Vec<_> = events.iter().map(AsFd::as_fd).collect();
        vectors.connect(0, &events).unwrap();
        assert_eq!(fake.connected(), [true]);
    }
}
