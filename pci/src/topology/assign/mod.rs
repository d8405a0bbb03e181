//! What firmware does before the guest's kernel starts: bus numbers, bridge windows and addresses.
//!
//! Where things come to lie is [`room`](super::room)'s to say. A bridge with a slot has 2 MiB in each
//! memory window at least: an operating system that finds a window closed, because nothing behind it
//! needs one, would place it anew at each boot. Functions are left with decoding off, for the guest's
//! drivers to turn on; bridges are left open.

use super::Topology;
use super::room::{Behind, Needs, Request, What, find_room, place, places};
use super::tree::{FunctionId, Node, Parent, Tree};
use crate::address::Segment;
use crate::bar::{BarIndex, BarKind};
use crate::function::{HotPlug, PciFunction};
use crate::spec;
use crate::windows::{Reserve, WindowKind, Windows};

/// The functions do not fit into the machine's windows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AssignError {
    /// {function}: {bar} of {size} bytes finds no room in the guest's {window} beside the other devices: give the VM fewer devices, or less memory where it is above RAM
    #[error(
        "{function}: {bar} of {size} bytes finds no room in the guest's {window} beside the other \
         devices: give the VM fewer devices{}",
        if *window == WindowKind::Memory64 { " or less memory" } else { "" }
    )]
    NoRoom {
        /// What the function is called: a host device by its address there.
        function: String,
        /// Which BAR.
        bar: BarIndex,
        /// Its bytes.
        size: u64,
        /// Which window.
        window: WindowKind,
    },
    /// there are more than 255 buses behind bridges: use fewer root ports
    #[error("there are more than 255 buses behind bridges: use fewer root ports")]
    TooManyBuses,
}

impl Topology {
    /// Numbers the buses of a segment and gives every BAR in it an address within `windows`, as firmware does. No vCPU
    /// may run.
    ///
    /// I/O BARs for which no ports are left stay at 0, with a warning, as few devices need theirs:
    /// behind bridges each takes 4 KiB of 64.
    ///
    /// # Errors
    /// [`AssignError`], naming the BAR that found no room.
    pub fn assign(&self, segment: Segment, windows: &Windows) -> Result<(), AssignError> {
        let mut mappings = self.mappings();
        let tree = self.snapshot();
        let outcome = assign(&tree, segment, windows);
        let ids: Vec<_> = tree.nodes().iter().map(|node| node.id).collect();
        self.remap(&mut mappings, &ids);
        outcome
    }
}

impl Topology {
    /// Whether all of a segment would find room if `function` were on its bus 0, too, as addresses are assigned at a
    /// start.
    ///
    /// # Errors
    /// [`AssignError::NoRoom`]
    pub fn has_room(
        &self,
        segment: Segment,
        windows: &Windows,
        function: &dyn PciFunction,
    ) -> Result<(), AssignError> {
        let tree = self.snapshot();
        let mut all = needs(&tree, Parent::Root(segment), &Some);
        all.push(Needs {
            function: None,
            bars: function.bar_sizes(),
            bridge: None,
        });
        for window in [WindowKind::Memory32, WindowKind::Memory64] {
            find_room(&all, window, windows).map_err(|missing| {
                let name = match missing.function {
                    Some(id) => tree
                        .get(id)
                        .map_or_else(String::new, |node| node.pci.name()),
                    None => function.name(),
                };
                AssignError::NoRoom {
                    function: name,
                    bar: missing.bar,
                    size: missing.size,
                    window,
                }
            })?;
        }
        Ok(())
    }
}

fn assign(tree: &Tree, segment: Segment, windows: &Windows) -> Result<(), AssignError> {
    let nodes = || {
        let inside = |node: &&Node| tree.segment(node.id) == Some(segment);
        tree.nodes().iter().filter(inside)
    };
    let bridges = || nodes().filter(|node| node.pci.bridge().is_some());
    let decode = spec::COMMAND_IO | spec::COMMAND_MEMORY;
    for node in nodes() {
        let command = read16(&*node.pci, spec::COMMAND);
        write16(&*node.pci, spec::COMMAND, command & !decode);
    }
    let root = Parent::Root(segment);
    number_buses(tree, root, 0, &mut 1)?;
    let needs = needs(tree, root, &|id| id);
    for window in [WindowKind::Io, WindowKind::Memory32, WindowKind::Memory64] {
        for node in bridges() {
            close_window(&*node.pci, window);
        }
        place_in_root(tree, &needs, window, windows)?;
    }
    for node in bridges() {
        let command = read16(&*node.pci, spec::COMMAND);
        let open = command | decode | spec::COMMAND_BUS_MASTER;
        write16(&*node.pci, spec::COMMAND, open);
    }
    Ok(())
}

/// Numbers the buses behind the bridges of one bus, depth first, from `next` on.
fn number_buses(tree: &Tree, bus: Parent, number: u8, next: &mut u16) -> Result<(), AssignError> {
    for node in tree
        .children(bus)
        .filter(|node| node.pci.bridge().is_some())
    {
        let secondary = u8::try_from(*next).map_err(|_| AssignError::TooManyBuses)?;
        *next += 1;
        number_buses(tree, Parent::Bridge(node.id), secondary, next)?;
        let subordinate = (*next - 1) as u8;
        node.pci.config_write(spec::PRIMARY_BUS, &[number]);
        node.pci.config_write(spec::SECONDARY_BUS, &[secondary]);
        node.pci.config_write(spec::SUBORDINATE_BUS, &[subordinate]);
    }
    Ok(())
}

/// What the functions of one bus need, with all that is behind them.
///
/// `call` is what a function is called in them.
fn needs<F>(tree: &Tree, bus: Parent, call: &impl Fn(FunctionId) -> F) -> Vec<Needs<F>> {
    tree.children(bus)
        .map(|node| Needs {
            function: call(node.id),
            bars: node.pci.bar_sizes(),
            bridge: node.pci.bridge().map(|bridge| Behind {
                reserve: bridge
                    .hot_plug()
                    .map_or(Reserve::default(), HotPlug::reserve),
                functions: needs(tree, Parent::Bridge(node.id), call),
            }),
        })
        .collect()
}

/// Places what bus 0 needs into the machine's window.
fn place_in_root(
    tree: &Tree,
    needs: &[Needs<FunctionId>],
    window: WindowKind,
    windows: &Windows,
) -> Result<(), AssignError> {
    let missing = place(needs, window, windows, |request, at| {
        write_address(tree, request, at, window);
    });
    for bar in missing {
        let error = AssignError::NoRoom {
            function: tree
                .get(bar.function)
                .map_or_else(String::new, |node| node.pci.name()),
            bar: bar.bar,
            size: bar.size,
            window,
        };
        if window != WindowKind::Io {
            return Err(error);
        }
        log::warn!("{error}; it is left without");
    }
    Ok(())
}

/// Writes the address of a BAR, or a window and what is in it, into the registers.
fn write_address(tree: &Tree, request: &Request<FunctionId>, place: u128, window: WindowKind) {
    let Some(node) = tree.get(request.function) else {
        return;
    };
    match &request.what {
        What::Bar(index, kind) => set_bar(&*node.pci, *index, *kind, place as u64),
        What::Window(inner) => {
            open_window(
                &*node.pci,
                window,
                place as u64,
                (place + request.size - 1) as u64,
            );
            for (request, place) in inner.iter().zip(places(inner, place)) {
                write_address(tree, request, place, window);
            }
        }
    }
}

fn set_bar(pci: &dyn PciFunction, index: BarIndex, kind: BarKind, address: u64) {
    let register = match index {
        BarIndex::Bar(number) => spec::BAR0 + 4 * u16::from(number.min(spec::BAR_COUNT - 1)),
        BarIndex::Rom => spec::ROM_ADDRESS,
    };
    pci.config_write(register, &(address as u32).to_le_bytes());
    if matches!(kind, BarKind::Memory64 { .. }) {
        pci.config_write(register + 4, &((address >> 32) as u32).to_le_bytes());
    }
}

fn open_window(bridge: &dyn PciFunction, window: WindowKind, first: u64, last: u64) {
    match window {
        WindowKind::Io => {
            bridge.config_write(spec::IO_BASE, &[(first >> 8) as u8]);
            bridge.config_write(spec::IO_LIMIT, &[(last >> 8) as u8]);
        }
        WindowKind::Memory32 => {
            write16(bridge, spec::MEMORY_BASE, (first >> 16) as u16);
            write16(bridge, spec::MEMORY_LIMIT, (last >> 16) as u16);
        }
        WindowKind::Memory64 => {
            let high = |address: u64| ((address >> 32) as u32).to_le_bytes();
            write16(bridge, spec::PREFETCHABLE_BASE, (first >> 16) as u16);
            write16(bridge, spec::PREFETCHABLE_LIMIT, (last >> 16) as u16);
            bridge.config_write(spec::PREFETCHABLE_BASE_UPPER, &high(first));
            bridge.config_write(spec::PREFETCHABLE_LIMIT_UPPER, &high(last));
        }
    }
}

/// A window is closed where its base is above its limit.
fn close_window(bridge: &dyn PciFunction, window: WindowKind) {
    let highest = match window {
        WindowKind::Io => 0xf000,
        WindowKind::Memory32 | WindowKind::Memory64 => 0xfff0_0000,
    };
    open_window(bridge, window, highest, 0);
}

fn read16(pci: &dyn PciFunction, offset: u16) -> u16 {
    let mut data = [0; 2];
    pci.config_read(offset, &mut data);
    u16::from_le_bytes(data)
}

fn write16(pci: &dyn PciFunction, offset: u16, value: u16) {
    pci.config_write(offset, &value.to_le_bytes());
}

#[cfg(test)]
mod tests;
