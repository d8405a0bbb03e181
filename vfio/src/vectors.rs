//! Telling the device where its interrupts go: MSI and MSI-X over `VFIO_DEVICE_SET_IRQS`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use busway_pci::{Complaints, VectorOwner};

use crate::event_fd::signal;
use crate::{DeviceIo, IrqError, IrqIndex, IrqInfo};

/// MSI's vectors, which are enabled all at once.
#[derive(Debug)]
pub(crate) struct MsiVectors {
    name: String,
    io: Arc<dyn DeviceIo>,
    /// That there are fewer than asked for.
    fewer: Complaints,
}

impl MsiVectors {
    pub(crate) fn new(name: &str, io: Arc<dyn DeviceIo>) -> Self {
        Self {
            name: name.to_owned(),
            io,
            fewer: Complaints::first(1),
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
                log::log!(
                    self.fewer.next(log::Level::Warn),
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
/// The device's MSI-X is enabled when the guest's is. Where the kernel can add vectors to those in
/// use, each but the first costs the host a vector when it is connected and not before. An older
/// kernel fixes the number when MSI-X is enabled: it is given the whole table then, with no eventfds,
/// so that later vectors are only connected, and what has none costs the host no interrupt line.
///
/// A host that cannot give that many gets what is needed, and MSI-X is disabled and enabled again
/// with more each time. What the device sends in that window is lost to the kernel, and so is what it
/// kept pending; every connected vector is therefore signalled once when the window closes, and every
/// other when it is connected. A driver finds nothing to do, or what it would have missed.
///
/// Another device can take the host's vectors in that window. Where not even those that there were can
/// be had again, all are lost, and each is connected anew when the guest next unmasks it.
#[derive(Debug)]
pub(crate) struct MsixVectors {
    name: String,
    io: Arc<dyn DeviceIo>,
    /// How many the kernel has set up, zero while MSI-X is disabled there.
    enabled: u32,
    /// It was disabled for a moment since the guest enabled it.
    interrupted: bool,
    /// The connected ones' eventfds, by vector, where they may be needed again.
    kept: Vec<Option<OwnedFd>>,
    /// Complaints that the host has fewer vectors than the table.
    fewer: Complaints,
    /// Complaints that all vectors were lost.
    lost: Complaints,
}

impl MsixVectors {
    pub(crate) fn new(name: &str, io: Arc<dyn DeviceIo>) -> Self {
        Self {
            name: name.to_owned(),
            io,
            enabled: 0,
            interrupted: false,
            kept: Vec::new(),
            fewer: Complaints::first(1),
            lost: Complaints::first(1),
        }
    }

    fn set(&self, first: u32, events: &[Option<BorrowedFd<'_>>]) -> Result<(), IrqError> {
        self.io.set_irqs(IrqIndex::Msix, first, events)
    }

    /// Enables MSI-X with no vector connected: room for all of them where it cannot be added, and
    /// else for one, which is the least that enabling takes.
    fn enable_empty(&mut self) -> io::Result<()> {
        let IrqInfo { count, resizable } = self.io.irq(IrqIndex::Msix);
        let empty = vec![None; count as usize];
        let (one, _) = empty.split_at(empty.len().min(1));
        let all = if resizable { one } else { &empty };
        match self.set(0, all) {
            Ok(()) => self.enabled = all.len() as u32,
            Err(IrqError::Fewer { given }) => {
                log::log!(
                    self.fewer.next(log::Level::Info),
                    "{}: the host can give {given} of {count} MSI-X vectors; adding them as they \
                     are needed",
                    self.name
                );
                self.set(0, one).map_err(io::Error::other)?;
                self.enabled = 1;
            }
            Err(error) => return Err(io::Error::other(error)),
        }
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
        if self.enabled == 0 {
            self.enable_empty()?;
        }
        if info.resizable || end <= self.enabled {
            self.set(first, events).map_err(io::Error::other)?;
            self.enabled = self.enabled.max(end);
            if self.interrupted {
                events.iter().flatten().copied().for_each(signal);
            }
            return Ok(());
        }
        self.enable_again(first, events)
    }

    /// Enables MSI-X anew with room for the vectors from `first` on, and every connected one.
    fn enable_again(&mut self, first: u32, events: &[Option<BorrowedFd<'_>>]) -> io::Result<()> {
        disable(&self.name, &*self.io, IrqIndex::Msix);
        let mut before: Vec<_> = self
            .kept
            .iter()
            .map(|event| event.as_ref().map(AsFd::as_fd))
            .collect();
        before.resize(before.len().max(1), None);
        let first = first as usize;
        let mut all = before.clone();
        all.resize(all.len().max(first.saturating_add(events.len())), None);
        for (slot, event) in all.iter_mut().skip(first).zip(events) {
            *slot = *event;
        }
        self.interrupted = true;
        let (connected, result) = match self.set(0, &all) {
            Ok(()) => (all, Ok(())),
            Err(error) => match self.set(0, &before) {
                Ok(()) => (before, Err(error)),
                Err(lost) => {
                    self.lose_all(&lost);
                    return Err(io::Error::other(error));
                }
            },
        };
        connected.iter().flatten().copied().for_each(signal);
        self.enabled = connected.len() as u32;
        result.map_err(io::Error::other)
    }

    /// What was connected could not be had again: MSI-X is disabled in the kernel.
    fn lose_all(&mut self, error: &IrqError) {
        log::log!(
            self.lost.next(log::Level::Warn),
            "{}: the host does not give back its {} MSI-X vectors: {error}; each is silent until \
             the guest next unmasks it, as when its driver is loaded again; a host with interrupt \
             remapping has enough",
            self.name,
            self.kept.iter().flatten().count()
        );
        self.enabled = 0;
        self.kept.clear();
    }
}

impl VectorOwner for MsixVectors {
    fn enable(&mut self) -> io::Result<()> {
        match self.enabled {
            0 => self.enable_empty(),
            _ => Ok(()),
        }
    }

    fn connect(&mut self, first: u16, events: &[BorrowedFd<'_>]) -> io::Result<()> {
        let info = self.io.irq(IrqIndex::Msix);
        let may_need_more = |enabled| !info.resizable && enabled < info.count;
        // Before the device is told: what fails then leaves everything as it was.
        let clones = match may_need_more(self.enabled) {
            true => events.iter().map(BorrowedFd::try_clone_to_owned).collect(),
            false => Ok(Vec::new()),
        }?;
        let set: Vec<_> = events.iter().copied().map(Some).collect();
        self.connect_more(first.into(), &set)?;
        if may_need_more(self.enabled) {
            let first = usize::from(first);
            let end = first.saturating_add(events.len());
            if self.kept.len() < end {
                self.kept.resize_with(end, || None);
            }
            for (slot, clone) in self.kept.iter_mut().skip(first).zip(clones) {
                *slot = Some(clone);
            }
        }
        Ok(())
    }

    fn has_lost_all(&self) -> bool {
        self.enabled == 0
    }

    fn disconnect_all(&mut self) {
        self.kept.clear();
        self.interrupted = false;
        if std::mem::take(&mut self.enabled) > 0 {
            disable(&self.name, &*self.io, IrqIndex::Msix);
        }
    }
}

pub(crate) fn disable(name: &str, io: &dyn DeviceIo, index: IrqIndex) {
    if let Err(error) = io.disable_irqs(index) {
        // A device that was pulled out has none any more.
        log::debug!("{name}: {index:?} cannot be disabled: {error}");
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::process::Command;
    use std::sync::atomic::Ordering;

    use proptest::prelude::*;

    use super::*;
    use crate::EventFd;
    use crate::fake::IrqCall;
    use crate::fake::{FakeDevice, eventfd};

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
        assert_eq!([&a, &b, &c].map(EventFd::take), [0, 0, 0]);
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

    /// A table of 8, of which the host gives 4.
    fn short_of_vectors() -> Arc<FakeDevice> {
        Arc::new(FakeDevice {
            msix: IrqInfo {
                count: 8,
                resizable: false,
            },
            most_vectors: 4,
            ..FakeDevice::default()
        })
    }

    #[test]
    fn a_host_short_of_vectors_loses_no_interrupt_when_one_is_added() {
        let fake = short_of_vectors();
        let mut vectors = MsixVectors::new("fake", fake.clone());
        let [a, b, c] = [eventfd(), eventfd(), eventfd()];
        vectors.connect(0, &[a.as_fd()]).unwrap();
        vectors.connect(3, &[b.as_fd()]).unwrap();
        assert_eq!(fake.connected(), [true, false, false, true]);
        assert_eq!([&a, &b].map(EventFd::take), [1, 1]);
        // The fifth is too many; the others go on.
        assert!(vectors.connect(4, &[c.as_fd()]).is_err());
        assert_eq!(fake.connected(), [true, false, false, true]);
        assert_eq!([&a, &b, &c].map(EventFd::take), [1, 1, 0]);
    }

    #[test]
    fn vectors_that_the_host_takes_back_are_lost_and_can_be_connected_again() {
        let fake = short_of_vectors();
        let mut vectors = MsixVectors::new("fake", fake.clone());
        let [a, b, c] = [eventfd(), eventfd(), eventfd()];
        vectors.connect(0, &[a.as_fd()]).unwrap();
        vectors.connect(1, &[b.as_fd()]).unwrap();
        let _before = [&a, &b].map(EventFd::take);
        // Others take three of the four while MSI-X is disabled.
        fake.taken_vectors.store(3, Ordering::Relaxed);
        assert!(vectors.connect(2, &[c.as_fd()]).is_err());
        assert!(vectors.has_lost_all());
        assert_eq!((fake.kind(), fake.connected()), (None, vec![]));
        assert!(vectors.kept.is_empty());
        fake.taken_vectors.store(0, Ordering::Relaxed);
        vectors.connect(1, &[b.as_fd()]).unwrap();
        assert!(!vectors.has_lost_all());
        assert_eq!(fake.connected(), [false, true]);
        // What it missed meanwhile.
        assert_eq!([&a, &b, &c].map(EventFd::take), [0, 1, 0]);
    }

    #[test]
    fn the_device_is_in_msix_mode_from_when_the_guest_enables_it() {
        for (resizable, most_vectors, room) in [(true, 8, 1), (false, 8, 4), (false, 2, 1)] {
            let fake = Arc::new(FakeDevice {
                msix: IrqInfo {
                    count: 4,
                    resizable,
                },
                most_vectors,
                ..FakeDevice::default()
            });
            let mut vectors = MsixVectors::new("fake", fake.clone());
            vectors.enable().unwrap();
            assert_eq!(fake.kind(), Some(IrqIndex::Msix));
            assert_eq!(fake.connected(), vec![false; room]);
            vectors.disconnect_all();
            assert_eq!(fake.kind(), None);
        }
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

    #[test]
    fn a_signal_needs_no_descriptor_of_its_own() {
        const NAME: &str = "vectors::tests::a_signal_needs_no_descriptor_of_its_own";
        const INNER: &str = "BUSWAY_TEST_FEW_DESCRIPTORS";
        // In a process whose limit is no other test's.
        if std::env::var_os(INNER).is_none() {
            let test = std::env::current_exe().unwrap();
            let limited = r#"ulimit -n 64; exec "$0" --exact "$1""#;
            let limited = Command::new("sh")
                .args(["-c", limited])
                .arg(test)
                .arg(NAME)
                .env(INNER, "")
                .output()
                .unwrap();
            assert!(limited.status.success(), "{limited:?}");
            return;
        }
        let event = eventfd();
        let taken: Vec<_> =
            std::iter::from_fn(|| event.as_fd().try_clone_to_owned().ok()).collect();
        event.signal();
        drop(taken);
        assert_eq!(event.take(), 1);
    }

    /// What the guest or the device does to a vector.
    #[derive(Clone, Copy, Debug)]
    enum Step {
        Connect(u16),
        Send(u16),
        DisconnectAll,
    }

    proptest! {
        /// On any kernel and however few vectors the host has: what the device sends after a vector
        /// was connected signals that vector's eventfd, also what it sends while MSI-X is disabled in
        /// order to be enabled with more; and what it sent before, once MSI-X was enabled.
        #[test]
        fn no_interrupt_is_lost(
            resizable: bool,
            most_vectors in 1..8_u32,
            sends_when_disabled in prop::collection::vec(0..6_u32, 0..3),
            steps in prop::collection::vec(prop_oneof![
                4 => (0..6_u16).prop_map(Step::Connect),
                4 => (0..6_u16).prop_map(Step::Send),
                1 => Just(Step::DisconnectAll),
            ], 0..40),
        ) {
            let count = 6;
            let fake = Arc::new(FakeDevice {
                msix: IrqInfo { count, resizable },
                most_vectors,
                sends_when_disabled: sends_when_disabled.clone(),
                ..FakeDevice::default()
            });
            let mut vectors = MsixVectors::new("fake", fake.clone());
            let mut connected: BTreeMap<u16, EventFd> = BTreeMap::new();
            let mut sent = [false; 6];
            vectors.enable().unwrap();
            for step in steps {
                match step {
                    Step::Connect(vector) if !connected.contains_key(&vector) => {
                        let event = eventfd();
                        fake.forget_irq_calls();
                        let result = vectors.connect(vector, &[event.as_fd()]);
                        let fits = u32::from(vector) < most_vectors;
                        prop_assert!(result.is_ok() || !fits && !resizable, "{result:?}");
                        if result.is_ok() {
                            connected.insert(vector, event);
                        }
                        let window = fake.irq_calls().contains(&IrqCall::Disable(IrqIndex::Msix));
                        for vector in &sends_when_disabled {
                            sent[*vector as usize] |= window;
                        }
                    }
                    Step::Connect(_) => {}
                    Step::Send(vector) => {
                        fake.send(vector.into());
                        sent[usize::from(vector)] = true;
                    }
                    Step::DisconnectAll => {
                        vectors.disconnect_all();
                        connected.clear();
                        sent = [false; 6];
                        vectors.enable().unwrap();
                    }
                }
                for (vector, event) in &connected {
                    let signals = event.take();
                    prop_assert!(signals > 0 || !sent[usize::from(*vector)], "{vector} is lost");
                    sent[usize::from(*vector)] = false;
                }
            }
        }
    }
}
