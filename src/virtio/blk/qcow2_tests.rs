//! A qcow2 disk that ends without a flush.

use std::path::Path;
use std::time::Duration;

use super::image::tests::{load, make_qcow2, open_again, qcow2};
use super::tests::Disk;
use super::*;
use crate::config::ImageType;
use crate::virtio::spec::pci::common;
use crate::virtio::testing::eventually;

/// A disk to which its guest has written once, and flushed nothing; and its image.
struct Unflushed {
    disk: Disk,
    image: Arc<Image>,
    folder: tempfile::TempDir,
}

impl Unflushed {
    fn new() -> Self {
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = folder.path().join("disk.qcow2");
        make_qcow2(&path, 64 << 20, None);
        let config = DiskConfig {
            queue_size: 64,
            image_type: ImageType::Qcow2,
            ..DiskConfig::new(&path)
        };
        let device = Blk::new("disk0", &config).unwrap();
        let image = Arc::clone(&device.image);
        let mut disk = Disk::new(device);
        assert_eq!(disk.write(8, &[7; 4096]), blk::S_OK);
        Self {
            disk,
            image,
            folder,
        }
    }
}

/// Whether the image has what was written, for whoever opens it now.
fn has_all(path: &Path) -> bool {
    load(&open_again(path, qcow2(false)), 4096, 4096) == [7; 4096]
}

#[test]
fn what_was_written_is_in_the_image_of_a_disk_that_is_reset() {
    let Unflushed { disk, folder, .. } = Unflushed::new();
    disk.driver.set_common(common::DEVICE_STATUS, &[0]);
    eventually("reset", || disk.driver.status() == 0);
    // The disk has the image still, and what its end writes is not in the copy.
    let copy = folder.path().join("copy");
    std::fs::copy(folder.path().join("disk.qcow2"), &copy).unwrap();
    assert!(has_all(&copy));
}

#[test]
fn what_was_written_is_in_the_image_of_a_disk_that_is_gone() {
    let Unflushed {
        disk,
        image,
        folder,
    } = Unflushed::new();
    drop((disk, image));
    assert!(has_all(&folder.path().join("disk.qcow2")));
}

#[test]
fn a_host_that_does_not_take_an_image_s_tables_holds_no_end_up() {
    let Unflushed {
        disk,
        image,
        folder,
    } = Unflushed::new();
    image.gate.set_closed(true);
    let start = Instant::now();
    drop(disk);
    assert!(start.elapsed() < Duration::from_secs(4));
    assert_eq!(image.gate.waiting(), 1);
    image.gate.set_closed(false);
    eventually("released", || Arc::strong_count(&image) == 1);
    drop(image);
    assert!(has_all(&folder.path().join("disk.qcow2")));
}
