use busway_pci::Bdf;

use super::tests::{DISK, Machine, disk, image, made};
use super::*;

#[test]
fn a_device_comes_to_the_segment_and_the_slot_that_are_asked_for() {
    let Some(mut machine) = made(1 << 30, 2) else {
        return;
    };
    let at = |machine: &Machine, id: &str, pci_segment, pci_device_id| {
        VirtioConfig::Disk(DiskConfig {
            pci_segment,
            pci_device_id,
            ..disk(&image(&machine.folder, id), Some(id))
        })
    };
    for (id, segment, device, address) in [
        ("a", 1, None, "0001:00:01.0"),
        ("b", 1, Some(9), "0001:00:09.0"),
        ("c", 0, Some(9), "0000:00:09.0"),
    ] {
        let config = at(&machine, id, segment, device);
        let answer = machine.add(config);
        let expected = Added::one(id.to_owned(), address.to_owned());
        assert_eq!(answer, Ok(Answer::Added(expected)));
        let mut data = [0; 2];
        let bdf: Bdf = address.parse().unwrap();
        machine.pci.topology().config_read(bdf, 2, &mut data);
        assert_eq!(u16::from_le_bytes(data), DISK, "{address}");
    }
    for (segment, device, words) in [
        (2, None, "num_pci_segments"),
        (1, Some(9), "slot 9"),
        (1, Some(16), "1 to 15"),
    ] {
        let config = at(&machine, "d", segment, device);
        let why = machine.add(config).unwrap_err().to_string();
        assert!(why.contains(words), "{why}");
    }
}
