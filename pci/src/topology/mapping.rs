//! Which BARs are mapped now, and the way from there to what should be.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::tree::{FunctionId, Tree};
use crate::address::{Bdf, Segment};
use crate::bar::BarRegion;
use crate::complaints::Complaints;
use crate::function::{BarMapper, PciFunction};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    New,
    Mapped,
    /// The machine did not take it. It is tried again when another BAR makes room.
    Refused,
}

#[derive(Debug)]
struct Mapping {
    function: Arc<dyn PciFunction>,
    region: BarRegion,
    state: State,
}

/// Refusals that are warnings: a guest that places a BAR badly can do so as often as it likes.
const LOUD_REFUSALS: u32 = 16;

/// What the guest can reach, by function.
#[derive(Debug)]
pub(super) struct Mappings {
    functions: BTreeMap<FunctionId, Vec<Mapping>>,
    /// That BARs were not taken where the guest placed them.
    refusals: Complaints,
}

impl Default for Mappings {
    fn default() -> Self {
        Self {
            functions: BTreeMap::new(),
            refusals: Complaints::first(LOUD_REFUSALS),
        }
    }
}

impl Mappings {
    /// Unmaps everything.
    pub(super) fn clear(&mut self, mapper: &dyn BarMapper) {
        let all = std::mem::take(&mut self.functions).into_values().flatten();
        for mapping in all.filter(|mapping| mapping.state == State::Mapped) {
            mapper.unmap(&mapping.function, &mapping.region);
        }
    }

    /// Brings the mappings of `functions` in line with the tree. All that goes is unmapped before
    /// anything is mapped, so that BARs can change places. Says how often the mapper was called.
    pub(super) fn update(
        &mut self,
        tree: &Tree,
        functions: &[FunctionId],
        mapper: &dyn BarMapper,
    ) -> u32 {
        let (mut room_made, mut calls) = (false, 0_u32);
        for &id in functions {
            let wanted = tree.reachable(id);
            let mappings = self.functions.entry(id).or_default();
            mappings.retain(|mapping| {
                let keep = wanted.contains(&mapping.region);
                if !keep && mapping.state == State::Mapped {
                    mapper.unmap(&mapping.function, &mapping.region);
                    room_made = true;
                    calls = calls.saturating_add(1);
                }
                keep
            });
            for region in wanted {
                let known = mappings.iter().any(|m| m.region.index == region.index);
                if let Some(node) = tree.get(id).filter(|_| !known) {
                    mappings.push(Mapping {
                        function: node.pci.clone(),
                        region,
                        state: State::New,
                    });
                }
            }
            if mappings.is_empty() {
                self.functions.remove(&id);
            }
        }
        for (&id, mappings) in &mut self.functions {
            let segment = tree.segment(id).unwrap_or_default();
            for mapping in mappings {
                match mapping.state {
                    State::New => {
                        let level = || self.refusals.next(log::Level::Warn);
                        mapping.map(mapper, segment, tree.bdf(id), level);
                        calls = calls.saturating_add(1);
                    }
                    State::Refused if room_made => {
                        mapping.map(mapper, segment, tree.bdf(id), || log::Level::Debug);
                        calls = calls.saturating_add(1);
                    }
                    State::Refused | State::Mapped => {}
                }
            }
        }
        calls
    }
}

impl Mapping {
    fn map(
        &mut self,
        mapper: &dyn BarMapper,
        segment: Segment,
        bdf: Option<Bdf>,
        refusal: impl Fn() -> log::Level,
    ) {
        self.state = match mapper.map(segment, &self.function, &self.region) {
            Ok(()) => State::Mapped,
            Err(error) => {
                let BarRegion {
                    index,
                    address,
                    size,
                    ..
                } = self.region;
                log::log!(
                    refusal(),
                    "{}: the guest placed {index} ({size:#x} bytes) at {address:#x}, where it cannot be: {error}; the guest does not reach it there",
                    bdf.unwrap_or_default(),
                );
                State::Refused
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::address::Device;
    use crate::bar::BarIndex;
    use crate::fake::{FakeFunction, FakeMapper, MEMORY_32};
    use crate::spec;
    use crate::topology::{Place, Topology};

    thread_local! {
        static WARNINGS: Cell<u32> = const { Cell::new(0) };
    }

    /// Counts the warnings of each thread.
    struct Counter;

    impl log::Log for Counter {
        fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
            metadata.level() <= log::Level::Warn
        }

        fn log(&self, record: &log::Record<'_>) {
            if self.enabled(record.metadata()) {
                WARNINGS.set(WARNINGS.get() + 1);
            }
        }

        fn flush(&self) {}
    }

    #[test]
    fn a_guest_that_places_a_bar_badly_without_end_does_not_fill_the_log() {
        log::set_logger(&Counter).unwrap();
        log::set_max_level(log::LevelFilter::Warn);
        let topology = Topology::new(FakeMapper::new(true));
        let on = |number| {
            let bar = (BarIndex::Bar(0), MEMORY_32, 0x1000);
            let place = Place::root(Device::new(number).unwrap());
            topology.add(place, FakeFunction::new(&[bar])).unwrap();
            Bdf::new(0, number, 0).unwrap()
        };
        let (here, there) = (on(1), on(2));
        topology.config_write(here, spec::COMMAND, &[2, 0]);
        for round in 1..1000 {
            topology.config_write(there, spec::COMMAND, &[2, 0]);
            topology.config_write(there, spec::COMMAND, &[0, 0]);
            assert_eq!(WARNINGS.get(), round.min(LOUD_REFUSALS));
        }
    }
}
