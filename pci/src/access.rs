//! The guest's two ways to configuration space: memory (ECAM) and the ports CF8 and CFC.
//!
//! Both only find out who is meant and hand on to the [`Topology`].

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::address::{Bdf, Segment};
use crate::spec;
use crate::topology::Topology;

/// Configuration space of one segment as memory: 4 KiB for each function of 256 buses. PCIe 6.0 §7.2.2.
#[derive(Clone, Debug)]
pub struct Ecam {
    topology: Arc<Topology>,
    segment: Segment,
}

impl Ecam {
    /// The configuration space of a segment of `topology`.
    #[must_use]
    pub fn new(topology: Arc<Topology>, segment: Segment) -> Self {
        Self { topology, segment }
    }

    /// Reads `offset` bytes from the start of bus 0; all ones where nothing answers.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(u8::MAX);
        let mut rest = data;
        for (bdf, register, width) in by_function(offset, rest.len()) {
            let (part, after) = rest.split_at_mut(width);
            self.topology
                .config_read(bdf.in_segment(self.segment), register, part);
            rest = after;
        }
    }

    /// Writes `offset` bytes from the start of bus 0; dropped where nothing answers.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let mut rest = data;
        for (bdf, register, width) in by_function(offset, data.len()) {
            let (part, after) = rest.split_at(width);
            self.topology
                .config_write(bdf.in_segment(self.segment), register, part);
            rest = after;
        }
    }
}

/// Cuts an access at the end of each function's configuration space, and off at the end of ECAM.
fn by_function(offset: u64, width: usize) -> impl Iterator<Item = (Bdf, u16, usize)> {
    let function_size = u64::from(spec::CONFIG_SPACE_SIZE);
    let end = offset.saturating_add(width as u64).min(spec::ECAM_SIZE);
    let mut at = offset;
    std::iter::from_fn(move || {
        let part = at;
        if part >= end {
            return None;
        }
        at = (part + 1).next_multiple_of(function_size).min(end);
        let bdf = Bdf::from_routing_id((part / function_size) as u16);
        Some((bdf, (part % function_size) as u16, (at - part) as usize))
    })
}

/// Configuration space through I/O ports: an address at CF8, then data at CFC. It reaches the first
/// 256 bytes of each function of segment 0, and no other segment. PCI Local Bus Specification 3.0 §3.2.2.3.2.
#[derive(Debug)]
pub struct Cf8Cfc {
    topology: Arc<Topology>,
    address: AtomicU32,
}

impl Cf8Cfc {
    /// How many ports there are from 0xCF8 on.
    pub const PORTS: u64 = 8;

    /// The bits of the address register that there are.
    const ADDRESS_BITS: u32 = 0x80ff_fffc;

    /// The configuration space of `topology`.
    #[must_use]
    pub fn new(topology: Arc<Topology>) -> Self {
        Self {
            topology,
            address: AtomicU32::new(0),
        }
    }

    /// Reads `port` ports above 0xCF8. The address register answers accesses of its whole width
    /// only; narrower ones (such as to the reset register at 0xCF9) read all ones here.
    pub fn read(&self, port: u64, data: &mut [u8]) {
        let address = self.address.load(Ordering::Relaxed);
        if port == 0 && data.len() == 4 {
            data.copy_from_slice(&address.to_le_bytes());
            return;
        }
        match target(address, port, data.len()) {
            Some((bdf, register)) => self.topology.config_read(bdf, register, data),
            None => data.fill(u8::MAX),
        }
    }

    /// Writes `port` ports above 0xCF8. The address register takes accesses of its whole width only.
    pub fn write(&self, port: u64, data: &[u8]) {
        if let (0, &[a, b, c, d]) = (port, data) {
            let address = u32::from_le_bytes([a, b, c, d]) & Self::ADDRESS_BITS;
            self.address.store(address, Ordering::Relaxed);
            return;
        }
        let address = self.address.load(Ordering::Relaxed);
        if let Some((bdf, register)) = target(address, port, data.len()) {
            self.topology.config_write(bdf, register, data);
        }
    }

    /// Puts the address register to zero, as at reset.
    pub fn reset(&self) {
        self.address.store(0, Ordering::Relaxed);
    }
}

/// Which register an access to the data ports means, where it is within them and they are enabled.
fn target(address: u32, port: u64, width: usize) -> Option<(Bdf, u16)> {
    let byte = port.checked_sub(4).filter(|&byte| byte < 4)?;
    let fits = byte + width as u64 <= 4;
    if !fits || address & spec::CONFIG_ADDRESS_ENABLE == 0 {
        return None;
    }
    let bdf = Bdf::from_routing_id((address >> 8) as u16);
    Some((bdf, (address & 0xfc) as u16 + byte as u16))
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::address::Device;
    use crate::bar::BarIndex;
    use crate::fake::{FakeFunction, FakeMapper, FakeRoutes, MEMORY_32};
    use crate::host_bridge::HostBridge;
    use crate::link::Link;
    use crate::root_port::RootPort;
    use crate::topology::Place;

    /// A host bridge, and a function behind a port on bus 1.
    fn topology() -> Arc<Topology> {
        let topology = Topology::new(FakeMapper::new(false));
        let at = |number| Place::root(Device::new(number).unwrap());
        topology.add(at(0), Arc::new(HostBridge::new())).unwrap();
        let port = RootPort::new(1, Link::default(), Arc::new(FakeRoutes::default()));
        let port = topology.add(at(1), Arc::new(port)).unwrap();
        let function = FakeFunction::new(&[(BarIndex::Bar(0), MEMORY_32, 0x1000)]);
        topology.add(Place::behind(port), function).unwrap();
        let bus = Bdf::new(0, 1, 0).unwrap();
        topology.config_write(bus, spec::SECONDARY_BUS, &[1, 1]);
        Arc::new(topology)
    }

    /// The same with a second segment: a host bridge, and one function on its bus 0.
    fn two_segments() -> Arc<Topology> {
        let topology = topology();
        let at = |number| Place::root(Device::new(number).unwrap()).in_segment(Segment(1));
        topology.add(at(0), Arc::new(HostBridge::new())).unwrap();
        let function = FakeFunction::new(&[(BarIndex::Bar(0), MEMORY_32, 0x1000)]);
        topology.add(at(3), function).unwrap();
        topology
    }

    #[test]
    fn each_segment_has_a_configuration_space_of_its_own_and_the_ports_reach_the_first() {
        let topology = two_segments();
        let ecams = [0, 1, 2].map(|segment| Ecam::new(topology.clone(), Segment(segment)));
        let vendors = |offset| ecams.each_ref().map(|ecam| read::<2>(ecam, offset));
        assert_eq!(vendors(0), [[0x36, 0x1b], [0x36, 0x1b], [0xff; 2]]);
        // Device 3 of bus 0, and bus 1 behind the port.
        assert_eq!(vendors(0x1_8000), [[0xff; 2], [0x34, 0x12], [0xff; 2]]);
        assert_eq!(vendors(0x10_0000), [[0x34, 0x12], [0xff; 2], [0xff; 2]]);
        ecams[1].write(0x1_8010, &[0xff; 4]);
        assert_eq!(read(&ecams[1], 0x1_8010), [0, 0xf0, 0xff, 0xff]);
        let ports = Cf8Cfc::new(topology);
        ports.write(0, &0x8000_1800u32.to_le_bytes());
        let mut data = [0; 4];
        ports.read(4, &mut data);
        assert_eq!(data, [0xff; 4]);
    }

    fn read<const N: usize>(ecam: &Ecam, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        ecam.read(offset, &mut data);
        data
    }

    #[test]
    fn memory_offsets_name_bus_device_function_and_register() {
        let ecam = Ecam::new(topology(), Segment(0));
        assert_eq!(read(&ecam, 0), [0x36, 0x1b, 0x08, 0x00]);
        assert_eq!(read(&ecam, 0x10_0002), [0x78, 0x56]);
        assert_eq!(read(&ecam, 0x8000), [0x36, 0x1b, 0x0c, 0x00]);
        assert_eq!(read(&ecam, 0x1000), [0xff; 4]);
        assert_eq!(read(&ecam, spec::ECAM_SIZE), [0xff; 4]);
        ecam.write(0x10_0010, &[0xff; 8]);
        assert_eq!(read(&ecam, 0x10_0010), [0, 0xf0, 0xff, 0xff, 0, 0, 0, 0]);
    }

    #[test]
    fn an_access_across_two_functions_reaches_both() {
        let ecam = Ecam::new(topology(), Segment(0));
        assert_eq!(read(&ecam, 0x7ffe), [0xff, 0xff, 0x36, 0x1b]);
        assert_eq!(read(&ecam, 0xffe), [0, 0, 0xff, 0xff]);
        assert_eq!(read(&ecam, 0x0fff_fffe), [0xff; 4]);
    }

    fn ports() -> impl Fn(u64, usize) -> u32 {
        let ports = Cf8Cfc::new(topology());
        ports.write(0, &0x8001_0000u32.to_le_bytes());
        move |port, width| {
            let mut data = [0; 4];
            ports.read(port, &mut data[..width]);
            u32::from_le_bytes(data)
        }
    }

    #[test]
    fn the_data_ports_read_the_register_that_the_address_port_names() {
        let read = ports();
        assert_eq!(read(4, 4), 0x5678_1234);
        assert_eq!((read(6, 2), read(5, 1)), (0x5678, 0x12));
        assert_eq!(read(0, 4), 0x8001_0000);
        assert_eq!((read(1, 1), read(7, 2), read(8, 1)), (0xff, 0xffff, 0xff));
    }

    #[test]
    fn the_address_port_takes_whole_doublewords_only() {
        let ports = Cf8Cfc::new(topology());
        let address = || {
            let mut data = [0; 4];
            ports.read(0, &mut data);
            u32::from_le_bytes(data)
        };
        ports.write(0, &u32::MAX.to_le_bytes());
        assert_eq!(address(), 0x80ff_fffc);
        ports.write(0, &0x8000_0800u32.to_le_bytes());
        ports.write(3, &[1]);
        ports.write(0, &[0, 0]);
        assert_eq!(address(), 0x8000_0800);
        let mut data = [0; 2];
        ports.read(4, &mut data);
        assert_eq!(data, [0x36, 0x1b]);
        ports.write(0, &0x0000_0800u32.to_le_bytes());
        ports.read(4, &mut data);
        assert_eq!(data, [0xff; 2], "the enable bit is off");
        ports.reset();
        assert_eq!(address(), 0);
    }

    #[test]
    fn a_write_through_the_data_ports_arrives() {
        let ports = Cf8Cfc::new(topology());
        ports.write(0, &0x8001_0010u32.to_le_bytes());
        ports.write(6, &[0xad, 0xde]);
        let mut data = [0; 4];
        ports.read(4, &mut data);
        assert_eq!(u32::from_le_bytes(data), 0xdead_0000);
    }

    proptest! {
        #[test]
        fn no_access_of_any_offset_and_width_panics(
            segment in (0..3_u32).prop_map(Segment),
            accesses in vec((
                prop_oneof![0..0x1000u64, 0x8000..0x9000u64, 0x10_0000..0x10_1000u64, any::<u64>()],
                vec(any::<u8>(), 0..20),
            ), 0..40),
        ) {
            let topology = two_segments();
            let ecam = Ecam::new(topology.clone(), segment);
            let ports = Cf8Cfc::new(topology);
            for (offset, mut data) in accesses {
                ecam.write(offset, &data);
                ecam.read(offset, &mut data);
                ports.write(offset % 12, &data);
                ports.read(offset % 12, &mut data);
                ports.read(offset, &mut data);
            }
        }
    }
}
