//! The part of mapping that both of the kernel's interfaces share: what is checked before the kernel
//! is asked, what is remembered after, and what its refusals mean.

use std::io;
use std::sync::Arc;

use crate::memlock::{self, Accounting};
use crate::ranges::first_gap;
use crate::stats::Shown;
use crate::tracker::Backing;
use crate::{DmaMapping, Iova, IovaRange, MapError, Stats, SysRoot, Tracker, reserved};

/// What is mapped in one address space, for whom, and how often the kernel was asked.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    tracker: Tracker,
    /// The groups of the attached devices, one entry for each: who reserves addresses.
    groups: Vec<u32>,
    stats: Stats,
    shown: Arc<Shown>,
}

impl Ledger {
    /// Maps by `call` and remembers it. Without `usable` no device is attached to map for, and it is
    /// remembered only.
    pub(crate) fn map(
        &mut self,
        paths: &SysRoot,
        mapping: DmaMapping,
        usable: Option<&[IovaRange]>,
        call: impl Fn(&DmaMapping, IovaRange) -> Result<(), MapError>,
    ) -> Result<(), MapError> {
        let range = self.tracker.check(&mapping)?;
        if let Some(usable) = usable {
            self.check_usable(paths, &mapping, range, usable)?;
            call(&mapping, range)?;
            self.count(&mapping);
        }
        let result = self.tracker.insert(mapping);
        self.show();
        result
    }

    /// Maps everything that is remembered, in as few calls as it takes.
    pub(crate) fn map_all(
        &mut self,
        paths: &SysRoot,
        usable: &[IovaRange],
        call: impl Fn(&DmaMapping, IovaRange) -> Result<(), MapError>,
    ) -> Result<(), MapError> {
        let mappings: Vec<_> = self.tracker.iter().cloned().collect();
        for mapping in &mappings {
            // The tracker holds none that has no range.
            if let Some(range) = mapping.range() {
                self.check_usable(paths, mapping, range, usable)?;
                call(mapping, range)?;
                self.count(mapping);
            }
        }
        self.show();
        Ok(())
    }

    /// Unmaps by `call`, where there is somebody it is mapped for, and forgets it.
    pub(crate) fn unmap(
        &mut self,
        iova: Iova,
        size: u64,
        what: &'static str,
        call: Option<impl FnOnce() -> io::Result<()>>,
    ) -> Result<(), MapError> {
        let range = self.tracker.check_removal(iova, size)?;
        if let Some(call) = call {
            call().map_err(|source| MapError::Kernel {
                what,
                owner: "what is mapped".to_owned(),
                range,
                source,
            })?;
        }
        let result = self.tracker.remove(iova, size);
        self.show();
        result
    }

    /// How many mappings there are.
    pub(crate) fn mappings(&self) -> usize {
        self.tracker.count()
    }

    /// A device of this group is attached now.
    pub(crate) fn joined(&mut self, group: u32) {
        self.groups.push(group);
    }

    /// One device of this group is not any more.
    pub(crate) fn left(&mut self, group: u32) {
        if let Some(at) = self.groups.iter().position(|&number| number == group) {
            self.groups.swap_remove(at);
        }
    }

    /// What of the memory that is mapped a device of `group` reserves: why it cannot be attached.
    pub(crate) fn conflict(&self, paths: &SysRoot, group: u32) -> Option<MapError> {
        let reserved = reserved::of_group(paths, group);
        self.tracker.iter().find_map(|mapping| {
            let range = mapping.range()?;
            let hole = reserved.iter().find(|hole| hole.range.overlaps(&range))?;
            Some(MapError::Unusable {
                owner: mapping.owner.clone(),
                range,
                gap: hole.range,
                why: hole.to_string(),
            })
        })
    }

    /// Where what was done so far is shown, to be read without the lock that this is behind.
    pub(crate) fn shown(&self) -> Arc<Shown> {
        Arc::clone(&self.shown)
    }

    fn show(&self) {
        self.shown.show(Stats {
            bytes: self.tracker.bytes(),
            mappings: self.mappings() as u64,
            ..self.stats
        });
    }

    fn check_usable(
        &self,
        paths: &SysRoot,
        mapping: &DmaMapping,
        range: IovaRange,
        usable: &[IovaRange],
    ) -> Result<(), MapError> {
        let Some(gap) = first_gap(range, usable) else {
            return Ok(());
        };
        Err(MapError::Unusable {
            owner: mapping.owner.clone(),
            range,
            gap,
            why: reserved::explain(paths, &self.groups, gap, usable),
        })
    }

    fn count(&mut self, mapping: &DmaMapping) {
        match mapping.backing {
            Backing::Memory | Backing::Block => self.stats.map_calls += 1,
            Backing::Device => self.stats.device_map_calls += 1,
        }
    }
}

/// What it means that the kernel refused a mapping.
pub(crate) fn refused(
    paths: &SysRoot,
    accounting: Accounting,
    what: &'static str,
    mapping: &DmaMapping,
    range: IovaRange,
    source: io::Error,
) -> MapError {
    let owner = mapping.owner.clone();
    // Only memory is pinned, and counts against a limit. That of blocks was judged with all the rest at the start, and
    // who maps them while the guest runs may not look at the host.
    if source.raw_os_error() == Some(libc::ENOMEM) && mapping.backing == Backing::Memory {
        return match memlock::explains(paths, accounting, mapping.size) {
            Some(source) => MapError::Memlock {
                owner,
                range,
                source,
            },
            None => MapError::OutOfMemory { owner, range },
        };
    }
    MapError::Kernel {
        what,
        owner,
        range,
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Access, HostVa};
    use std::cell::RefCell;

    fn mapping(iova: u64, host: usize, backing: Backing) -> DmaMapping {
        DmaMapping {
            iova: Iova(iova),
            host: HostVa(host),
            size: 0x1000,
            access: Access::ReadWrite,
            backing,
            owner: "guest RAM".to_owned(),
        }
    }

    #[test]
    fn what_comes_before_any_device_is_mapped_later_in_one_call_where_it_goes_on() {
        let (paths, mut ledger) = (SysRoot::default(), Ledger::default());
        let calls = RefCell::new(Vec::new());
        let call = |mapping: &DmaMapping, _: IovaRange| {
            calls.borrow_mut().push((mapping.iova.0, mapping.size));
            Ok(())
        };
        for page in [0, 1, 2] {
            let at = page * 0x1000;
            let piece = mapping(at, 0x10_0000 + at as usize, Backing::Memory);
            ledger.map(&paths, piece, None, call).unwrap();
        }
        assert!(calls.borrow().is_empty());
        ledger.map_all(&paths, &[IovaRange::ALL], call).unwrap();
        assert_eq!(*calls.borrow(), [(0, 0x3000)]);
        let bar = mapping(0x3000, 0x10_3000, Backing::Device);
        ledger
            .map(&paths, bar, Some(&[IovaRange::ALL]), call)
            .unwrap();
        let stats = ledger.shown().seen();
        assert_eq!(
            (
                stats.map_calls,
                stats.device_map_calls,
                stats.bytes,
                stats.mappings
            ),
            (1, 1, 0x3000, 2)
        );
    }

    #[test]
    fn a_device_that_comes_after_the_last_one_left_finds_everything_mapped() {
        let (paths, mut ledger) = (SysRoot::default(), Ledger::default());
        let all = [IovaRange::ALL];
        let calls = RefCell::new(Vec::new());
        let call = |mapping: &DmaMapping, _: IovaRange| {
            calls.borrow_mut().push((mapping.iova.0, mapping.size));
            Ok(())
        };
        let none = None::<fn() -> io::Result<()>>;
        ledger.joined(7);
        for at in [0, 0x8000] {
            let piece = mapping(at, 0x10_0000, Backing::Memory);
            ledger.map(&paths, piece, Some(&all), call).unwrap();
        }
        ledger.left(7);
        // What comes and goes meanwhile is heard of as well.
        ledger.unmap(Iova(0), 0x1000, "UNMAP", none).unwrap();
        let piece = mapping(0x4000, 0x20_0000, Backing::Memory);
        ledger.map(&paths, piece, None, call).unwrap();
        ledger.joined(8);
        ledger.map_all(&paths, &all, call).unwrap();
        let (before, after) = ([(0, 0x1000), (0x8000, 0x1000)], [(0x4000, 0x1000)]);
        let expected = [&before[..], &after, &before[1..]].concat();
        assert_eq!(*calls.borrow(), expected);
    }

    #[test]
    fn what_the_kernel_refused_is_not_remembered_and_what_it_cannot_reach_not_asked() {
        let (paths, mut ledger) = (SysRoot::default(), Ledger::default());
        let refusing = |mapping: &DmaMapping, range| {
            Err(refused(
                &paths,
                Accounting::Process,
                "MAP",
                mapping,
                range,
                io::Error::from_raw_os_error(libc::EEXIST),
            ))
        };
        let usable = [IovaRange {
            start: 0,
            last: 0xffff,
        }];
        let low = mapping(0, 0x10_0000, Backing::Memory);
        let error = ledger.map(&paths, low, Some(&usable), refusing);
        assert!(matches!(error, Err(MapError::Kernel { .. })));
        let high = mapping(0x1_0000, 0x10_0000, Backing::Memory);
        let error = ledger.map(&paths, high, Some(&usable), refusing);
        assert!(matches!(error, Err(MapError::Unusable { .. })));
        assert_eq!((ledger.mappings(), ledger.shown().seen().map_calls), (0, 0));
    }
}
