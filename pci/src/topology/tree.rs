//! Where functions are: the tree of buses, and which of its branches the guest's bus numbers reach.

use std::sync::{Arc, Mutex};

use crate::activity::Access;
use crate::address::{Bdf, Bus, Device, Function, Segment};
use crate::bar::BarRegion;
use crate::function::PciFunction;
use crate::pace::{Clock, Pace};

/// A function's name within its topology, for as long as that lives. It says nothing about the bus
/// number, which is the guest's to choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FunctionId(u32);

/// What is above a bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parent {
    /// A segment's root complex: the bus is bus 0 of that segment.
    Root(Segment),
    /// A bridge.
    Bridge(FunctionId),
}

/// Where a function sits: on bus 0 of a segment, or on the bus behind a bridge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// What is above the bus that it is on.
    pub parent: Parent,
    /// Device number. A root port's link leads to device 0 only.
    pub device: Device,
    /// Function number. A device without a function 0 is not found by the guest.
    pub function: Function,
}

impl Place {
    /// Function 0 of a device on bus 0 of segment 0.
    #[must_use]
    pub fn root(device: Device) -> Self {
        Self {
            parent: Parent::Root(Segment(0)),
            device,
            function: Function::default(),
        }
    }

    /// The same device on bus 0 of `segment`.
    #[must_use]
    pub fn in_segment(self, segment: Segment) -> Self {
        Self {
            parent: Parent::Root(segment),
            ..self
        }
    }

    /// Function 0 of the device behind a root port.
    #[must_use]
    pub fn behind(port: FunctionId) -> Self {
        Self {
            parent: Parent::Bridge(port),
            device: Device::default(),
            function: Function::default(),
        }
    }

    /// The same device, another function.
    #[must_use]
    pub fn with_function(self, function: Function) -> Self {
        Self { function, ..self }
    }
}

/// A function cannot be added there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlaceError {
    /// device {device:#04x} function {function} is taken on {bus}
    #[error("device {device:#04x} function {function} is taken on {bus}")]
    Taken {
        /// Which bus, for a person.
        bus: String,
        /// The device number.
        device: u8,
        /// The function number.
        function: u8,
    },
    /// the function meant to be the bridge above is no bridge, or has been removed
    #[error("the function meant to be the bridge above is no bridge, or has been removed")]
    NoBridge,
}

/// A function in its place.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) id: FunctionId,
    pub(super) place: Place,
    pub(super) pci: Arc<dyn PciFunction>,
    /// Held while the function is written, and what that asks for is carried out.
    pub(super) write: Arc<Mutex<()>>,
    /// What its writes cost the host.
    pub(super) pace: Arc<Pace>,
}

impl Node {
    /// The guest has come by an exit.
    pub(super) fn count(&self, access: Access) {
        if let Some(activity) = self.pci.activity() {
            activity.count(access);
        }
    }

    /// Secondary and subordinate bus number, where the node is a bridge that reaches `bus`.
    fn reaches(&self, bus: u8) -> Option<(u8, u8)> {
        let bridge = self.pci.bridge()?;
        let (secondary, subordinate) = bridge.bus_numbers();
        let within = secondary != 0 && (secondary..=subordinate).contains(&bus);
        (within && !bridge.in_reset()).then_some((secondary, subordinate))
    }
}

/// All functions. A bridge comes before what is behind it.
#[derive(Clone, Debug, Default)]
pub(super) struct Tree {
    nodes: Vec<Node>,
    added: u32,
}

impl Tree {
    pub(super) fn add(
        &mut self,
        place: Place,
        pci: Arc<dyn PciFunction>,
        clock: &Arc<dyn Clock>,
    ) -> Result<FunctionId, PlaceError> {
        if let Parent::Bridge(bridge) = place.parent {
            let above = self.get(bridge).and_then(|node| node.pci.bridge());
            above.ok_or(PlaceError::NoBridge)?;
        }
        if self.nodes.iter().any(|node| node.place == place) {
            return Err(PlaceError::Taken {
                bus: match place.parent {
                    Parent::Bridge(_) => "the bus behind that bridge".to_owned(),
                    Parent::Root(Segment(0)) => "bus 0".to_owned(),
                    Parent::Root(segment) => format!("bus 0 of segment {}", segment.0),
                },
                device: place.device.number(),
                function: place.function.number(),
            });
        }
        let id = FunctionId(self.added);
        self.added += 1;
        let pace = Arc::new(Pace::new(pci.name(), clock.clone()));
        self.nodes.push(Node {
            id,
            place,
            pci,
            write: Arc::default(),
            pace,
        });
        Ok(id)
    }

    /// Takes out a function and all that is behind it.
    pub(super) fn remove(&mut self, id: FunctionId) -> Vec<Node> {
        let doomed = self.with_descendants(id);
        let (out, kept) = std::mem::take(&mut self.nodes)
            .into_iter()
            .partition(|node| doomed.contains(&node.id));
        self.nodes = kept;
        out
    }

    pub(super) fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    pub(super) fn get(&self, id: FunctionId) -> Option<&Node> {
        self.nodes.iter().find(|node| node.id == id)
    }

    /// What is on the bus below `parent`.
    pub(super) fn children(&self, parent: Parent) -> impl Iterator<Item = &Node> {
        let on_bus = move |node: &&Node| node.place.parent == parent;
        self.nodes.iter().filter(on_bus)
    }

    /// The bridge above a function, where it is not on bus 0.
    fn bridge_above(&self, node: &Node) -> Option<&Node> {
        match node.place.parent {
            Parent::Root(_) => None,
            Parent::Bridge(bridge) => self.get(bridge),
        }
    }

    /// The segment that `id` is in.
    pub(super) fn segment(&self, id: FunctionId) -> Option<Segment> {
        let mut node = self.get(id)?;
        loop {
            match node.place.parent {
                Parent::Root(segment) => return Some(segment),
                // A bridge was there before what is behind it, so this ends.
                Parent::Bridge(bridge) => node = self.get(bridge)?,
            }
        }
    }

    /// `id`, where it exists, and every function behind it.
    pub(super) fn with_descendants(&self, id: FunctionId) -> Vec<FunctionId> {
        let mut found = Vec::new();
        for node in &self.nodes {
            let below = match node.place.parent {
                Parent::Root(_) => false,
                Parent::Bridge(above) => found.contains(&above),
            };
            if node.id == id || below {
                found.push(node.id);
            }
        }
        found
    }

    /// The function that answers at `bdf` by the bus numbers as they are now.
    pub(super) fn find(&self, bdf: Bdf) -> Option<&Node> {
        let mut above = Parent::Root(bdf.segment);
        let mut at = 0;
        while at != bdf.bus.0 {
            // A bus below lies deeper than the bridge that reaches it, so this ends with the tree.
            let (bridge, secondary) = self.children(above).find_map(|node| {
                let (secondary, _) = node.reaches(bdf.bus.0)?;
                Some((node.id, secondary))
            })?;
            above = Parent::Bridge(bridge);
            at = secondary;
        }
        self.children(above)
            .find(|node| node.place.device == bdf.device && node.place.function == bdf.function)
    }

    /// Where `id` is by the bus numbers as they are now; on bus 0 where its bridge has none yet.
    pub(super) fn bdf(&self, id: FunctionId) -> Option<Bdf> {
        let node = self.get(id)?;
        let place = node.place;
        let bridge = self.bridge_above(node).and_then(|above| above.pci.bridge());
        Some(Bdf {
            segment: self.segment(id)?,
            bus: Bus(bridge.map_or(0, |bridge| bridge.bus_numbers().0)),
            device: place.device,
            function: place.function,
        })
    }

    /// Whether the device that `node` is part of has another function too.
    pub(super) fn is_multi_function(&self, node: &Node) -> bool {
        self.children(node.place.parent)
            .any(|other| other.place.device == node.place.device && other.id != node.id)
    }

    /// The BARs of `id` that the guest can reach: they decode, and every bridge above forwards them.
    pub(super) fn reachable(&self, id: FunctionId) -> Vec<BarRegion> {
        let Some(node) = self.get(id) else {
            return Vec::new();
        };
        let mut regions = node.pci.decoded();
        let mut above = self.bridge_above(node);
        while let Some(node) = above {
            if let Some(bridge) = node.pci.bridge() {
                let open = !bridge.in_reset();
                regions.retain(|region| open && bridge.forwards(region));
            }
            above = self.bridge_above(node);
        }
        regions
    }
}
