//! What a guest wrote to a qcow2 disk and did not flush, when its VM ends in order.

use std::fs;
use std::os::unix::fs::FileExt;

use crate::landlock::qcow2;
use crate::whole::Run;
use crate::writer::{SLOT, WRITTEN, writes_unflushed};

#[test]
fn what_a_guest_wrote_to_a_qcow2_disk_without_a_flush_is_in_its_image_when_the_vm_has_ended() {
    let folder = tempfile::tempdir().unwrap();
    let (below, image) = (folder.path().join("below"), folder.path().join("image"));
    fs::write(&below, [0; 64 << 10]).unwrap();
    fs::write(&image, qcow2(&below)).unwrap();
    let mut run = Run::new(&writes_unflushed());
    let disk = format!(
        "path={},image_type=qcow2,backing_files=on,pci_device_id={SLOT}",
        image.display()
    );
    run.command.args(["--disk", &disk]);
    let Some(finished) = run.finish() else {
        return;
    };
    let stderr = String::from_utf8_lossy(&finished.output.stderr);
    assert_eq!(finished.output.status.code(), Some(0), "{stderr}");
    // From the first-level table, which is the image's fourth cluster, to the first entry of the second, to the data.
    let image = fs::File::open(&image).unwrap();
    let entry = |place: u64| {
        let mut bytes = [0; 8];
        image.read_exact_at(&mut bytes, place).unwrap();
        u64::from_be_bytes(bytes) & 0x00ff_ffff_ffff_fe00
    };
    let second = entry(3 * (64 << 10));
    assert_ne!(second, 0, "{stderr}");
    let mut found = [0; WRITTEN.len()];
    image.read_exact_at(&mut found, entry(second)).unwrap();
    assert_eq!(found, WRITTEN, "{stderr}");
}
