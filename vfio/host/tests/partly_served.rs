//! Devices of which a guest has a part only are told from their like on made-up hosts.

mod fake_host;

use std::collections::BTreeSet;

use busway_host::{Check, Finding, Host, Level};
use busway_pci::Bdf;
use fake_host::FakeHost;

/// What `check` says of a device's being served in part, of all the devices that a host has.
fn partly(description: &str) -> Vec<(String, Vec<Finding>)> {
    let host = FakeHost::described(description);
    let host = Host::read(&host.root).unwrap();
    let all: BTreeSet<Bdf> = host.devices().map(|device| device.address).collect();
    let check = Check::of(&host, &all, 1 << 30, &|_| Ok(()));
    let devices = check.devices.into_iter().map(|device| {
        let findings = device.findings.into_iter();
        let found = findings
            .filter(|finding| finding.topic == "partly")
            .collect();
        (device.address.to_string(), found)
    });
    devices.collect()
}

/// The one finding about the first device.
fn of_first(description: &str) -> Option<Finding> {
    let (_, mut findings) = partly(description).remove(0);
    assert!(findings.len() < 2, "{findings:?}");
    findings.pop()
}

/// Each of these hosts' devices is told of in these words, with a remedy.
fn assert_told(level: Level, words: &[&str], descriptions: &[&str]) {
    for description in descriptions {
        let finding = of_first(description).expect(description);
        assert_eq!(finding.level, level, "{description}");
        for word in words {
            assert!(finding.text.contains(word), "{}", finding.text);
        }
        assert_eq!(finding.remedies.len(), 1, "{description}");
    }
}

fn assert_untold(descriptions: &[&str]) {
    for description in descriptions {
        assert_eq!(of_first(description), None, "{description}");
    }
}

#[test]
fn graphics_of_an_intel_processor_are_told_of_and_their_virtual_functions_and_cards_are_not() {
    let words = ["OpRegion", "stolen memory", "screens can stay dark"];
    let integrated = [
        "device 00:02.0 8086:3e9b class=030000 driver=i915 group=2 bars=16M/64,256M/64p,64/io boot_vga",
        "device 00:02.0 8086:9a49 class=038000 driver=vfio-pci group=2",
        "device 00:02.0 8086:4680 class=030000 driver=i915 group=1 vfs=0/7",
    ];
    assert_told(Level::Warning, &words, &integrated);
    let [.., with_vfs] = integrated;
    let remedy = of_first(with_vfs).unwrap().remedies.remove(0);
    let command = "busway device vfs 0000:00:02.0 1";
    let typed = remedy.command.as_ref().map(ToString::to_string);
    assert_eq!(typed.as_deref(), Some(command));
    let host = "
       device 00:01.0 8086:460d class=060400 driver=pcieport group=1 acs=on
         device 03:00.0 8086:56a0 class=030000 driver=xe group=20 bars=16M/64,16G/64p rom=2M
       device 00:02.0 8086:4680 class=030000 driver=i915 group=2 vfs=1/7
       device 00:02.1 8086:4680 class=030000 driver=vfio-pci group=3 pf=00:02.0#0
       device 00:03.0 1234:1111 class=030000 group=4";
    let all = partly(host).into_iter();
    let told = all.filter(|(_, findings)| !findings.is_empty());
    let told: Vec<_> = told.map(|(address, _)| address).collect();
    assert_eq!(told, ["0000:00:02.0"]);
}

#[test]
fn graphics_of_an_amd_processor_lack_their_bios_and_cards_have_it() {
    assert_told(
        Level::Warning,
        &["VFCT", "Unable to locate a BIOS ROM"],
        &[
            "device e4:00.0 1002:15bf class=030000 driver=amdgpu group=9 bars=256M/64p,2M/64p,256/io,512K",
        ],
    );
    assert_untold(&[
        "device 08:00.0 1002:73bf class=030000 driver=amdgpu group=9 bars=16G/64p,256M/64p rom=128K",
        "device e4:00.1 1002:1640 class=040300 driver=snd_hda_intel group=9 bars=16K",
        // What its BARs are cannot be seen.
        "device e4:00.0 1002:15bf class=030000 driver=amdgpu group=9",
    ]);
}

#[test]
fn wifi_whose_driver_tells_the_card_where_interrupts_go_is_told_of() {
    let words = ["ath11k", "interrupts do not arrive"];
    let cards = [
        "device 02:00.0 17cb:1103 class=028000 driver=ath11k_pci group=3 bars=2M/64",
        "device 02:00.0 17cb:1107 class=028000 driver=vfio-pci group=3 bars=2M/64",
    ];
    assert_told(Level::Warning, &words, &cards);
    assert_untold(&[
        "device 02:00.0 168c:0042 class=028000 driver=ath10k_pci group=3 bars=2M/64",
        "device 02:00.0 8086:1103 class=028000 driver=iwlwifi group=3 bars=16K/64",
    ]);
}

#[test]
fn a_vmd_that_does_not_say_where_its_memory_is_is_told_of() {
    let vmds = [
        "device 00:0e.0 8086:9a0b class=010400 driver=vmd group=4 bars=32M/64,32M,-,1M/64",
        "device 5d:05.5 8086:201d class=010400 driver=vfio-pci group=4",
    ];
    let words = ["VMD", "sees the drives there and does not reach them"];
    assert_told(Level::Warning, &words, &vmds);
    assert_untold(&[
        "device 16:00.5 8086:28c0 class=010400 driver=vmd group=4",
        "device 02:00.0 1000:0073 class=010400 driver=megaraid_sas group=4",
    ]);
}

#[test]
fn what_only_connects_others_or_has_its_memory_elsewhere_is_told_of() {
    let words = ["Thunderbolt", "the host's buses"];
    let ports = [
        "device 00:0d.2 8086:9a1b class=0c0340 driver=thunderbolt group=5",
        "device 00:0d.2 8086:9a1b class=0c0340 driver=vfio-pci group=5",
        "device 04:00.0 8086:15bf class=088000 driver=thunderbolt group=5",
    ];
    assert_told(Level::Warning, &words, &ports);
    assert_untold(&["device 00:0d.0 8086:9a13 class=0c0330 driver=xhci_hcd group=5"]);
    let memory = ["device 36:00.0 1344:cd00 class=050210 driver=cxl_pci group=6"];
    assert_told(Level::Warning, &["CXL", "none of its memory"], &memory);
}

#[test]
fn ide_in_compatibility_mode_is_told_of_and_in_native_mode_is_not() {
    let ide = |interface: &str| {
        format!("device 00:1f.2 8086:1c00 class=0101{interface} driver=ata_piix group=7")
    };
    for interface in ["80", "8a", "8b", "8e"] {
        assert_told(Level::Warning, &["0x1f0"], &[&ide(interface)]);
    }
    assert_untold(&[
        &ide("85"),
        &ide("8f"),
        "device 00:1f.2 8086:1c02 class=010601 driver=ahci group=7",
    ]);
}

#[test]
fn sound_that_firmware_describes_is_a_note_and_nothing_keeps_a_guest_from_having_it() {
    let dsp = "device 00:1f.3 8086:51c8 class=040100 driver=sof-audio-pci-intel-tgl group=8";
    assert_told(Level::Note, &["microphones", "ACPI"], &[dsp]);
    assert_untold(&["device 00:1f.3 8086:7ad0 class=040300 driver=snd_hda_intel group=8"]);
    for kind in ["class=040100", "class=0c0340", "class=050210"] {
        let (_, findings) = partly(&format!(
            "device 03:00.0 8086:1234 {kind} driver=vfio-pci group=8"
        ))
        .remove(0);
        assert!(findings[0].level < Level::Obstacle);
    }
}
