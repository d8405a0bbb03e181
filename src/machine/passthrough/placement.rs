//! Which host functions share a root port, and which sit on bus 0.
//!
//! The functions of one host device are one multi-function device of the guest's, as its drivers may
//! expect to find each other. A virtual function is a device of its own: its number says which it is
//! of its physical function's, and no more. So is a conventional device that shares a bus with others
//! on the host: behind ports of their own they do not share interrupts and windows, and Linux, as
//! every system, takes conventional functions behind a port. A mediated device, which is on no bus of the
//! host's, is one as well.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use busway_host::resources_in;
use busway_pci::{Bdf, Function, spec};
use busway_vfio::HostName;

use crate::config::DeviceConfig;

/// Which of the host's devices one is that the guest is to have.
#[derive(Clone, Debug)]
pub(in crate::machine) struct HostIdentity {
    /// Its folder in sysfs.
    pub(in crate::machine) folder: PathBuf,
    /// What the host calls it; nothing where that is not known.
    pub(in crate::machine) host: Option<HostName>,
    /// It is a virtual function.
    pub(in crate::machine) is_virtual: bool,
}

impl HostIdentity {
    /// The device whose folder in sysfs is `folder`.
    pub(in crate::machine) fn in_folder(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
            host: HostName::of_device(folder),
            is_virtual: folder.join("physfn").exists(),
        }
    }

    /// What the host calls it or, where that is not known, its folder.
    pub(in crate::machine) fn name(&self) -> String {
        match self.host {
            Some(host) => host.to_string(),
            None => self.folder.display().to_string(),
        }
    }

    /// Whether the device may have nothing but I/O ports, as far as sysfs says: it does not of a mediated one.
    pub(super) fn may_live_by_io(config: &DeviceConfig) -> bool {
        let bars = resources_in(&config.path);
        let mut bars = bars.iter().filter(|bar| bar.index < spec::BAR_COUNT);
        bars.all(|bar| bar.is_io())
    }

    /// Whether it is a mediated device, which is on no PCI bus of the host's.
    pub(in crate::machine) fn is_mediated(&self) -> bool {
        self.host.is_some_and(HostName::is_mediated)
    }

    /// Where it is on the host's PCI buses, where it is on one.
    fn address(&self) -> Option<Bdf> {
        self.host.and_then(HostName::address)
    }
}

/// A function behind a port: which of the given ones it is, and its number there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::machine) struct Behind {
    pub(in crate::machine) index: usize,
    pub(in crate::machine) function: Function,
}

/// What is behind each port, function 0 first. Ports come in the order in which the first function of
/// each was given, so that one more device at the end moves none.
///
/// Numbers are those of the host where its function 0 is among them; else the lowest becomes function
/// 0, for a guest does not look further where there is none, and the others keep theirs.
pub(in crate::machine) fn behind_ports<'a>(
    given: impl IntoIterator<Item = &'a HostIdentity>,
) -> Vec<Vec<Behind>> {
    let mut ports: Vec<(Option<Bdf>, Vec<Behind>)> = Vec::new();
    for (index, host) in given.into_iter().enumerate() {
        let device = host.address().filter(|_| !host.is_virtual);
        let new = Behind {
            index,
            function: device.map_or(Function::default(), |device| device.function),
        };
        let device = device.map(|device| Bdf {
            function: Function::default(),
            ..device
        });
        let same = ports
            .iter_mut()
            .find(|(other, _)| device.is_some() && *other == device);
        match same {
            Some((_, functions)) => functions.push(new),
            None => ports.push((device, vec![new])),
        }
    }
    ports
        .into_iter()
        .map(|(_, mut functions)| {
            functions.sort_by_key(|each| each.function);
            if let Some(lowest) = functions.first_mut() {
                lowest.function = Function::default();
            }
            functions
        })
        .collect()
}

/// Which of the given sit on bus 0 of a segment by themselves: those that are to, each with its segment, and are the only
/// function of their device, the first ones where a segment has fewer `slots`.
pub(super) fn on_root_bus<'a>(
    given: impl IntoIterator<Item = (&'a HostIdentity, Option<u16>)>,
    slots: impl Fn(u16) -> usize,
) -> Vec<bool> {
    let (hosts, wanted): (Vec<_>, Vec<_>) = given.into_iter().unzip();
    let mut counts = BTreeMap::<u16, usize>::new();
    let mut on_root_bus = vec![false; wanted.len()];
    let alone = behind_ports(hosts)
        .into_iter()
        .filter_map(|behind| match behind[..] {
            [one] => Some(one.index),
            _ => None,
        });
    for index in alone {
        let Some(segment) = wanted.get(index).copied().flatten() else {
            continue;
        };
        let count = counts.entry(segment).or_default();
        if *count < slots(segment)
            && let Some(one) = on_root_bus.get_mut(index)
        {
            *count += 1;
            *one = true;
        }
    }
    on_root_bus
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn host(text: &str) -> HostIdentity {
        HostIdentity {
            folder: PathBuf::new(),
            host: Some(text.parse().unwrap()),
            is_virtual: false,
        }
    }

    fn virtual_function(text: &str) -> HostIdentity {
        HostIdentity {
            is_virtual: true,
            ..host(text)
        }
    }

    fn numbers(given: &[HostIdentity]) -> Vec<Vec<(usize, u8)>> {
        let ports = behind_ports(given).into_iter().map(|port| {
            let functions = port.into_iter();
            functions
                .map(|each| (each.index, each.function.number()))
                .collect()
        });
        ports.collect()
    }

    #[test]
    fn functions_of_one_device_share_a_port_and_keep_their_numbers() {
        let given = ["01:00.1", "02:00.0", "01:00.0", "01:00.3"].map(host);
        assert_eq!(
            numbers(&given),
            [vec![(2, 0), (0, 1), (3, 3)], vec![(1, 0)]]
        );
    }

    #[test]
    fn without_function_0_the_lowest_takes_its_place() {
        let given = ["01:00.3", "01:00.2", "03:1f.6"].map(host);
        assert_eq!(numbers(&given), [vec![(1, 0), (0, 3)], vec![(2, 0)]]);
    }

    #[test]
    fn virtual_functions_and_devices_that_share_a_bus_are_devices_of_their_own() {
        let mut given = ["01:10.0", "01:10.2"].map(virtual_function).to_vec();
        given.extend(["02:01.0", "02:02.0", "01:00.0"].map(host));
        given.push(virtual_function("01:00.4"));
        let alone: Vec<_> = (0..given.len()).map(|index| vec![(index, 0)]).collect();
        assert_eq!(numbers(&given), alone);
        let mediated =
            [3, 4].map(|digit| host(&format!("bd8d9d2b-5a5f-4f5a-a211-f591514ba1f{digit}")));
        assert!(mediated.iter().all(HostIdentity::is_mediated));
        assert_eq!(numbers(&mediated), [[(0, 0)], [(1, 0)]]);
        let unknown = HostIdentity::in_folder(Path::new("/nowhere"));
        assert_eq!(numbers(&[unknown.clone(), unknown]), [[(0, 0)], [(1, 0)]]);
    }

    #[test]
    fn single_functions_that_are_to_sit_on_bus_0_do_as_long_as_there_are_slots() {
        let given = ["01:00.1", "02:00.0", "01:00.0", "03:00.0", "04:00.0"].map(host);
        let wanted = [Some(0), Some(0), Some(0), None, Some(0)];
        let on = |slots| on_root_bus(given.iter().zip(wanted), |_| slots);
        assert_eq!(on(15), [false, true, false, false, true]);
        assert_eq!(on(1), [false, true, false, false, false]);
        assert_eq!(on(0), [false; 5]);
        let alone = [host("01:00.1")];
        assert_eq!(on_root_bus([(&alone[0], Some(0))], |_| 1), [true]);
        // Each segment has slots of its own.
        let wanted = [0, 1, 0, 1, 1].map(Some);
        let given = ["01:00.0", "02:00.0", "03:00.0", "04:00.0", "05:00.0"].map(host);
        assert_eq!(
            on_root_bus(given.iter().zip(wanted), |segment| 1 + usize::from(segment)),
            [true, true, false, true, false]
        );
    }

    proptest! {
        #[test]
        fn each_function_has_one_place_and_each_port_a_function_0(
            ids in prop::collection::btree_set(any::<u16>(), 0..40),
        ) {
            let given: Vec<_> = ids
                .iter()
                .map(|&id| HostIdentity {
                    folder: PathBuf::new(),
                    host: Some(HostName::Pci(Bdf::from_routing_id(id))),
                    is_virtual: id % 5 == 0,
                })
                .collect();
            let ports = behind_ports(&given);
            let mut indices: Vec<_> = ports.iter().flatten().map(|each| each.index).collect();
            indices.sort_unstable();
            prop_assert!(indices.into_iter().eq(0..given.len()));
            for port in &ports {
                prop_assert_eq!(port[0].function.number(), 0);
                prop_assert!(port.windows(2).all(|pair| pair[0].function < pair[1].function));
            }
            let more = [&given[..], &[HostIdentity::in_folder(Path::new("/nowhere"))]].concat();
            prop_assert_eq!(&behind_ports(&more)[..ports.len()], &ports[..]);
        }
    }
}
