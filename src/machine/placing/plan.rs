//! On which of the host's nodes a guest's RAM, vCPUs and devices are to be, by where the devices are: a function of numbers
//! alone.
//!
//! The guest has a node for each of the host's nodes that has devices of its. RAM and vCPUs are split evenly among them, but
//! that no node gets more RAM than it has room for. Where there can be as many PCI segments as nodes, each node has one, for
//! its devices; else all devices are in segment 0, whose root bridge is of no node.

use std::collections::BTreeSet;

use super::PlacingError;
use crate::config::VcpuAffinity;

/// A node of the host's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HostNode {
    /// Its number.
    pub(super) number: u32,
    /// Its processors that this process may use, ascending.
    pub(super) cpus: Vec<usize>,
    /// Bytes of RAM that a guest could have there now.
    pub(super) room: u64,
}

/// What the guest is to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wish {
    /// Bytes of RAM, a multiple of `step`.
    pub(super) ram: u64,
    /// What the RAM of a node is a multiple of; bytes, not 0.
    pub(super) step: u64,
    /// vCPUs that there can be.
    pub(super) vcpus: u16,
    /// Each of them has a processor of the host's to itself.
    pub(super) dedicated: bool,
    /// PCI segments that there can be, 1 at least.
    pub(super) segments: u16,
}

/// Where it has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// The guest's nodes, by their numbers.
    pub(super) nodes: Vec<PlannedNode>,
    /// The PCI segment of each device.
    pub(super) segments: Vec<u16>,
}

/// A node of the guest's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PlannedNode {
    /// The host's node that it is on.
    pub(super) host: u32,
    /// Bytes of RAM.
    pub(super) ram: u64,
    /// Its vCPUs, each with the processors of the host's that it runs on.
    pub(super) vcpus: Vec<VcpuAffinity>,
    /// The PCI segment whose root bridge is near it, where there are as many segments as nodes.
    pub(super) segment: Option<u16>,
}

/// Where a guest is whose devices are on these nodes of the host's; `None` where that says nothing: the host has one node,
/// or no device is known to be on one.
///
/// # Errors
/// [`PlacingError`]: those nodes have not got what the guest is to have.
pub(super) fn plan(
    devices: &[Option<u32>],
    host: &[HostNode],
    wish: Wish,
) -> Result<Option<Plan>, PlacingError> {
    let wanted: BTreeSet<u32> = devices.iter().flatten().copied().collect();
    let chosen: Vec<&HostNode> = host
        .iter()
        .filter(|node| wanted.contains(&node.number))
        .collect();
    if host.len() < 2 || chosen.is_empty() {
        return Ok(None);
    }
    let ram = share_out(&chosen, wish)?;
    let vcpus = place_vcpus(&chosen, wish)?;
    let apart = chosen.len() <= usize::from(wish.segments);
    let number = |node: usize| u16::try_from(node).unwrap_or(u16::MAX);
    let segment = |node: usize| apart.then(|| number(node));
    let at = |device: &Option<u32>| chosen.iter().position(|node| Some(node.number) == *device);
    let segments = devices.iter().map(|device| at(device).and_then(segment));
    let segments = segments.map(Option::unwrap_or_default).collect();
    let all = chosen.iter().zip(ram).zip(vcpus).enumerate();
    let nodes = all
        .map(|(index, ((node, ram), vcpus))| PlannedNode {
            host: node.number,
            ram,
            vcpus,
            segment: segment(index),
        })
        .collect();
    Ok(Some(Plan { nodes, segments }))
}

/// The RAM of each node: as much of each, but no more than it has room for.
fn share_out(chosen: &[&HostNode], wish: Wish) -> Result<Vec<u64>, PlacingError> {
    let step = wish.step.max(1);
    let caps: Vec<u64> = chosen
        .iter()
        .map(|node| node.room - node.room % step)
        .collect();
    let room = caps.iter().copied().fold(0, u64::saturating_add);
    if room < wish.ram {
        return Err(PlacingError::Room {
            nodes: names(chosen),
            asked: wish.ram,
            room,
        });
    }
    let mut shares = vec![0_u64; chosen.len()];
    let mut left = wish.ram;
    // Each round gives all that is left, or fills a node.
    while left > 0 {
        let open = shares.iter().zip(&caps).filter(|(share, cap)| share < cap);
        let open = open.count() as u64;
        if open == 0 {
            break;
        }
        let even = left / open / step * step;
        for (share, cap) in shares.iter_mut().zip(&caps) {
            let given = even.max(step).min(*cap - *share).min(left);
            *share += given;
            left -= given;
        }
    }
    Ok(shares)
}

/// The vCPUs of each node, and where they run: as many on each node that has processors, those that follow one another
/// together.
fn place_vcpus(chosen: &[&HostNode], wish: Wish) -> Result<Vec<Vec<VcpuAffinity>>, PlacingError> {
    let able: Vec<usize> = (0..chosen.len())
        .filter(|node| chosen.get(*node).is_some_and(|node| !node.cpus.is_empty()))
        .collect();
    let mut placed = vec![Vec::new(); chosen.len()];
    if able.is_empty() {
        return Err(PlacingError::NoProcessor {
            nodes: names(chosen),
        });
    }
    for vcpu in 0..wish.vcpus {
        let turn = usize::from(vcpu) * able.len() / usize::from(wish.vcpus.max(1));
        let Some((index, node)) = able.get(turn).and_then(|at| Some((*at, chosen.get(*at)?)))
        else {
            continue;
        };
        let Some(own) = placed.get_mut(index) else {
            continue;
        };
        let host_cpus = match wish.dedicated {
            false => node.cpus.clone(),
            true => match node.cpus.get(own.len()) {
                Some(cpu) => vec![*cpu],
                None => {
                    return Err(PlacingError::TooFew {
                        node: node.number,
                        cpus: node.cpus.len(),
                    });
                }
            },
        };
        own.push(VcpuAffinity { vcpu, host_cpus });
    }
    Ok(placed)
}

/// `0 and 2`, for a message.
fn names(nodes: &[&HostNode]) -> String {
    let numbers: Vec<_> = nodes.iter().map(|node| node.number.to_string()).collect();
    numbers.join(" and ")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GIB: u64 = 1 << 30;
    const STEP: u64 = 128 << 20;

    fn node(number: u32, cpus: &[usize], room: u64) -> HostNode {
        HostNode {
            number,
            cpus: cpus.to_vec(),
            room,
        }
    }

    fn wish(ram: u64, vcpus: u16, segments: u16) -> Wish {
        Wish {
            ram,
            step: STEP,
            vcpus,
            dedicated: false,
            segments,
        }
    }

    fn host() -> Vec<HostNode> {
        vec![
            node(0, &[0, 1, 2, 3], 32 * GIB),
            node(1, &[4, 5, 6, 7], 32 * GIB),
        ]
    }

    #[test]
    fn devices_of_one_node_have_all_of_the_guest_there() {
        let devices = [Some(1), None, Some(1)];
        let plan = plan(&devices, &host(), wish(8 * GIB, 3, 1))
            .unwrap()
            .unwrap();
        let [only] = &plan.nodes[..] else {
            panic!("{plan:?}");
        };
        assert_eq!((only.host, only.ram, only.segment), (1, 8 * GIB, Some(0)));
        let places: Vec<_> = only.vcpus.iter().map(|place| place.vcpu).collect();
        assert_eq!(places, [0, 1, 2]);
        assert!(
            only.vcpus
                .iter()
                .all(|place| place.host_cpus == [4, 5, 6, 7])
        );
        assert_eq!(plan.segments, [0, 0, 0]);
    }

    #[test]
    fn devices_of_two_nodes_have_half_of_it_on_each_and_a_segment_each_where_there_can_be_two() {
        let devices = [Some(1), Some(0)];
        let apart = plan(&devices, &host(), wish(8 * GIB, 4, 16))
            .unwrap()
            .unwrap();
        assert_eq!(apart.nodes.len(), 2);
        for (index, node) in (0_u16..).zip(&apart.nodes) {
            assert_eq!((node.host, node.ram), (index.into(), 4 * GIB));
            assert_eq!((node.vcpus.len(), node.segment), (2, Some(index)));
        }
        assert_eq!(apart.segments, [1, 0]);
        let together = plan(&devices, &host(), wish(8 * GIB, 4, 1))
            .unwrap()
            .unwrap();
        assert!(together.nodes.iter().all(|node| node.segment.is_none()));
        assert_eq!(together.segments, [0, 0]);
    }

    #[test]
    fn a_host_of_one_node_and_devices_that_say_nothing_place_nothing() {
        let one = [node(0, &[0], GIB)];
        assert_eq!(plan(&[Some(0)], &one, wish(GIB, 1, 1)), Ok(None));
        assert_eq!(plan(&[None], &host(), wish(GIB, 1, 1)), Ok(None));
        assert_eq!(plan(&[], &host(), wish(GIB, 1, 1)), Ok(None));
        // A node that is not there any more, or has no memory and was left out.
        assert_eq!(plan(&[Some(7)], &host(), wish(GIB, 1, 1)), Ok(None));
    }

    #[test]
    fn a_full_node_gets_less_and_what_fits_nowhere_is_refused_with_the_figures() {
        let mut host = host();
        host[0].room = GIB + 1;
        let devices = [Some(0), Some(1)];
        let uneven = plan(&devices, &host, wish(8 * GIB, 2, 1)).unwrap().unwrap();
        let ram: Vec<_> = uneven.nodes.iter().map(|node| node.ram).collect();
        assert_eq!(ram, [GIB, 7 * GIB]);
        let why = plan(&[Some(0)], &host, wish(8 * GIB, 2, 1))
            .unwrap_err()
            .to_string();
        assert!(why.contains("8 GiB") && why.contains("1 GiB"), "{why}");
    }

    #[test]
    fn dedicated_processors_are_of_the_node_and_too_few_are_named() {
        let asked = Wish {
            dedicated: true,
            ..wish(GIB, 4, 1)
        };
        let all = plan(&[Some(1)], &host(), asked).unwrap().unwrap();
        let places: Vec<_> = all.nodes[0]
            .vcpus
            .iter()
            .map(|place| &*place.host_cpus)
            .collect();
        assert_eq!(places, [[4], [5], [6], [7]]);
        let more = Wish { vcpus: 5, ..asked };
        let why = plan(&[Some(1)], &host(), more).unwrap_err().to_string();
        assert!(
            why.contains("node 1") && why.contains("4 processors"),
            "{why}"
        );
        let mut bare = host();
        bare[1].cpus.clear();
        let why = plan(&[Some(1)], &bare, asked).unwrap_err().to_string();
        assert!(why.contains("no processor"), "{why}");
        // Memory alone is of use where another node has processors.
        let both = plan(&[Some(0), Some(1)], &bare, wish(GIB, 2, 1))
            .unwrap()
            .unwrap();
        assert_eq!(
            [both.nodes[0].vcpus.len(), both.nodes[1].vcpus.len()],
            [2, 0]
        );
    }

    proptest! {
        /// Whatever the host is like: nothing is lost or given twice, nothing is where there is no room, and what is near
        /// each other on the host is so in the guest.
        #[test]
        fn a_plan_has_all_that_was_asked_for_and_only_where_the_devices_are(
            rooms in prop::collection::vec((0_u64..64 * GIB, 0_usize..9), 0..9),
            devices in prop::collection::vec(prop::option::of(0_u32..10), 0..12),
            ram in 1_u64..512,
            vcpus in 1_u16..256,
            dedicated: bool,
            segments in 1_u16..17,
        ) {
            let mut next = 0;
            let host: Vec<HostNode> = (0_u32..)
                .zip(&rooms)
                .map(|(number, (room, cpus))| {
                    let first = next;
                    next += cpus;
                    HostNode { number, cpus: (first..next).collect(), room: *room }
                })
                .collect();
            let asked = Wish { ram: ram * STEP, step: STEP, vcpus, dedicated, segments };
            let of_host = |number: u32| host.iter().find(|node| node.number == number);
            let wanted: BTreeSet<u32> = devices.iter().flatten().copied().collect();
            let there: Vec<_> = wanted.iter().filter_map(|number| of_host(*number)).collect();
            let plan = match plan(&devices, &host, asked) {
                Ok(Some(plan)) => plan,
                Ok(None) => {
                    prop_assert!(host.len() < 2 || there.is_empty());
                    return Ok(());
                }
                Err(PlacingError::Room { room, .. }) => {
                    prop_assert!(room < asked.ram);
                    return Ok(());
                }
                Err(PlacingError::NoProcessor { .. }) => {
                    prop_assert!(there.iter().all(|node| node.cpus.is_empty()));
                    return Ok(());
                }
                Err(PlacingError::TooFew { node, .. }) => {
                    prop_assert!(dedicated && of_host(node).is_some());
                    return Ok(());
                }
            };
            prop_assert_eq!(plan.nodes.iter().map(|node| node.ram).sum::<u64>(), asked.ram);
            let numbers: Vec<_> = plan.nodes.iter().map(|node| node.host).collect();
            prop_assert_eq!(&numbers, &there.iter().map(|node| node.number).collect::<Vec<_>>());
            let placed: Vec<_> = plan.nodes.iter().flat_map(|node| &node.vcpus).collect();
            let mut all: Vec<_> = placed.iter().map(|place| place.vcpu).collect();
            all.sort_unstable();
            prop_assert_eq!(all, (0..vcpus).collect::<Vec<_>>());
            for node in &plan.nodes {
                let host = of_host(node.host).unwrap();
                prop_assert!(node.ram <= host.room && node.ram.is_multiple_of(STEP));
                let mut cpus = node.vcpus.iter().flat_map(|place| &place.host_cpus);
                prop_assert!(cpus.all(|cpu| host.cpus.contains(cpu)));
            }
            if dedicated {
                let taken: Vec<_> = placed.iter().flat_map(|place| &place.host_cpus).collect();
                prop_assert_eq!(taken.iter().collect::<BTreeSet<_>>().len(), usize::from(vcpus));
            }
            // Even, but where a node is full.
            let open = plan.nodes.iter().filter(|node| {
                node.ram + STEP <= of_host(node.host).unwrap().room
            });
            let shares: Vec<_> = open.map(|node| node.ram).collect();
            if let (Some(least), Some(most)) = (shares.iter().min(), shares.iter().max()) {
                prop_assert!(most - least <= STEP, "{:?}", shares);
            }
            prop_assert_eq!(plan.segments.len(), devices.len());
            prop_assert!(plan.segments.iter().all(|segment| *segment < segments));
            if plan.nodes.len() <= usize::from(segments) {
                for (device, segment) in devices.iter().zip(&plan.segments) {
                    let node = plan.nodes.iter().find(|node| Some(node.host) == *device);
                    prop_assert_eq!(node.and_then(|node| node.segment).unwrap_or(0), *segment);
                }
            }
        }
    }
}
