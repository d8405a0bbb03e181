//! Which BARs are mapped now, and the way from there to what should be.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::tree::{FunctionId, Tree};
use crate::address::Bdf;
use crate::function::{BarMapper, BarRegion, PciFunction};

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

/// What the guest can reach, by function.
#[derive(Debug, Default)]
pub(super) struct Mappings(BTreeMap<FunctionId, Vec<Mapping>>);

impl Mappings {
    /// Whether anything of a function is mapped.
    pub(super) fn has(&self, function: FunctionId) -> bool {
        let mappings = self.0.get(&function).into_iter().flatten();
        mappings
            .into_iter()
            .any(|mapping| mapping.state == State::Mapped)
    }

    /// Unmaps everything.
    pub(super) fn clear(&mut self, mapper: &dyn BarMapper) {
        let all = std::mem::take(&mut self.0).into_values().flatten();
        for mapping in all.filter(|mapping| mapping.state == State::Mapped) {
            mapper.unmap(&mapping.function, &mapping.region);
        }
    }

    /// Brings the mappings of `functions` in line with the tree. All that goes is unmapped before
    /// anything is mapped, so that BARs can change places.
    pub(super) fn update(&mut self, tree: &Tree, functions: &[FunctionId], mapper: &dyn BarMapper) {
        let mut room_made = false;
        for &id in functions {
            let wanted = tree.reachable(id);
            let mappings = self.0.entry(id).or_default();
            mappings.retain(|mapping| {
                let keep = wanted.contains(&mapping.region);
                if !keep && mapping.state == State::Mapped {
                    mapper.unmap(&mapping.function, &mapping.region);
                    room_made = true;
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
                self.0.remove(&id);
            }
        }
        for (&id, mappings) in &mut self.0 {
            for mapping in mappings {
                match mapping.state {
                    State::New => mapping.map(mapper, tree.bdf(id), log::Level::Warn),
                    State::Refused if room_made => {
                        mapping.map(mapper, tree.bdf(id), log::Level::Debug);
                    }
                    State::Refused | State::Mapped => {}
                }
            }
        }
    }
}

impl Mapping {
    fn map(&mut self, mapper: &dyn BarMapper, bdf: Option<Bdf>, refusal: log::Level) {
        self.state = match mapper.map(&self.function, &self.region) {
            Ok(()) => State::Mapped,
            Err(error) => {
                let BarRegion {
                    index,
                    address,
                    size,
                    ..
                } = self.region;
                log::log!(
                    refusal,
                    "{}: the guest placed {index} ({size:#x} bytes) at {address:#x}, where it cannot be: {error}; the guest does not reach it there",
                    bdf.unwrap_or_default(),
                );
                State::Refused
            }
        };
    }
}
