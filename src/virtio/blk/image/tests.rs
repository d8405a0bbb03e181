use super::*;
use std::fs::OpenOptions;
use std::io::Write;
use std::time::Duration;

fn open(path: &Path, readonly: bool) -> Result<Image, ImageError> {
    Image::open(
        path,
        ImageMode {
            readonly,
            ..ImageMode::default()
        },
    )
}

/// Opens what has been opened before. A program that another test starts keeps its lock for a moment.
pub(in crate::virtio::blk) fn open_again(path: &Path, mode: ImageMode) -> Image {
    for _ in 0..1000 {
        match Image::open(path, mode) {
            Err(ImageError::Locked { .. }) => std::thread::sleep(Duration::from_millis(10)),
            opened => return opened.unwrap(),
        }
    }
    panic!("{} stays locked", path.display());
}

#[test]
fn the_tail_that_fills_no_block_is_left_out() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&[7; 1500]).unwrap();
    assert_eq!(open(file.path(), false).unwrap().capacity(), 1024);
}

#[test]
fn what_is_no_disk_is_refused_by_name() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let empty = open(file.path(), false).unwrap_err().to_string();
    assert!(empty.contains("holds 0 bytes"), "{empty}");
    let null = open(Path::new("/dev/null"), false).unwrap_err().to_string();
    assert!(null.contains("a character device"), "{null}");
    let missing = open(Path::new("/nonexistent/disk"), false)
        .unwrap_err()
        .to_string();
    assert!(missing.contains("truncate -s"), "{missing}");
}

#[test]
fn a_second_writer_is_refused_and_told_who_the_first_is() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(4096).unwrap();
    let _first = open(file.path(), false).unwrap();
    for readonly in [false, true] {
        let error = open(file.path(), readonly).unwrap_err().to_string();
        let pid = format!("process {}", std::process::id());
        assert!(error.contains(&pid), "{error}");
    }
}

#[test]
fn readers_share_and_keep_writers_out() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(4096).unwrap();
    let _readers = [
        open(file.path(), true).unwrap(),
        open(file.path(), true).unwrap(),
    ];
    assert!(matches!(
        open(file.path(), false),
        Err(ImageError::Locked { .. })
    ));
}

/// Whether there is something, at each multiple of 64 MiB.
fn kept(file: &File, size: u64) -> Vec<bool> {
    let mut byte = [0];
    let places = (0..size).step_by(64 << 20);
    places
        .map(|at| {
            file.read_exact_at(&mut byte, at).unwrap();
            byte != [0]
        })
        .collect()
}

#[test]
fn a_discard_hears_a_stop_between_its_steps() {
    let size = 1 << 30;
    let file = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
    file.as_file().set_len(size).unwrap();
    for at in (0..size).step_by(64 << 20) {
        file.as_file().write_all_at(&[7; 4096], at).unwrap();
    }
    let image = open(file.path(), false).unwrap();
    let looks = std::cell::Cell::new(0);
    let third = || looks.replace(looks.get() + 1) == 2;
    let error = image.discard(0, size, &third).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::Interrupted);
    let kept = kept(file.as_file(), size);
    assert_eq!(kept.iter().take_while(|kept| !**kept).count(), 4);
    assert!(kept.iter().skip(4).all(|kept| *kept), "{kept:?}");
    assert!(image.discard(0, size, &|| false).is_ok());
}

#[test]
fn what_is_stopped_is_left_undone() {
    let file = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
    file.as_file().write_all_at(&[7; 4096], 0).unwrap();
    let image = open(file.path(), false).unwrap();
    let stopped = |result: io::Result<()>| {
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::Interrupted);
        let mut byte = [0];
        file.as_file().read_exact_at(&mut byte, 0).unwrap();
        assert_eq!(byte, [7]);
    };
    stopped(image.zero(0, 4096, true, &|| true));
    stopped(image.write_zeros(0, 4096, &|| true));
}

/// An empty qcow2 image of `size` bytes, which lies on `backing`, a name and a format, where there is one.
pub(in crate::virtio::blk) fn make_qcow2(path: &Path, size: u64, backing: Option<(&str, &str)>) {
    use imago::FormatCreateBuilder;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
        .unwrap();
    let options = imago::StorageOpenOptions::new().filename(path).write(true);
    let storage = imago::file::File::from_open_file(file, options).unwrap();
    let mut builder = imago::qcow2::Qcow2::<imago::file::File>::create_builder(storage).size(size);
    if let Some((name, format)) = backing {
        builder = builder.backing(name.to_owned(), format.to_owned());
    }
    builder.create().unwrap();
}

const MIB: u64 = 1 << 20;

pub(in crate::virtio::blk) fn qcow2(backing_files: bool) -> ImageMode {
    ImageMode {
        image_type: ImageType::Qcow2,
        backing_files,
        ..ImageMode::default()
    }
}

fn store(image: &Image, start: u64, byte: u8, len: usize) {
    let memory =
        vm_memory::GuestMemoryMmap::<()>::from_ranges(&[(vm_memory::GuestAddress(0), 0x10_0000)])
            .unwrap();
    let mut data = Segments::default();
    let slice =
        vm_memory::GuestMemoryBackend::get_slice(&memory, vm_memory::GuestAddress(1), len).unwrap();
    data.push(slice);
    data.clone().write(&vec![byte; len]);
    image.write(data, start, &|| false).unwrap();
}

pub(in crate::virtio::blk) fn load(image: &Image, start: u64, len: usize) -> Vec<u8> {
    let memory =
        vm_memory::GuestMemoryMmap::<()>::from_ranges(&[(vm_memory::GuestAddress(0), 0x10_0000)])
            .unwrap();
    let mut data = Segments::default();
    let slice =
        vm_memory::GuestMemoryBackend::get_slice(&memory, vm_memory::GuestAddress(1), len).unwrap();
    data.push(slice);
    image.read(data.clone(), start, &|| false).unwrap();
    let mut bytes = vec![0; len];
    data.read(&mut bytes);
    bytes
}

#[test]
fn a_qcow2_image_keeps_what_is_flushed_and_grows_with_what_is_written() {
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = folder.path().join("disk.qcow2");
    make_qcow2(&path, 64 * MIB, None);
    let image = Image::open(&path, qcow2(false)).unwrap();
    assert_eq!(image.capacity(), 64 * MIB);
    assert!(
        image.file().is_none(),
        "its bytes are not as the guest has them"
    );
    store(&image, 512, 7, 100 * 512);
    store(&image, 63 * MIB, 9, 4096);
    image.flush().unwrap();
    image.zero(512, 512, true, &|| false).unwrap();
    image.discard(32 * MIB, MIB, &|| false).unwrap();
    drop(image);
    let image = open_again(&path, qcow2(false));
    assert_eq!(load(&image, 512, 512), [0; 512]);
    assert_eq!(load(&image, 1024, 4096), [7; 4096]);
    assert_eq!(load(&image, 63 * MIB, 4096), [9; 4096]);
    assert_eq!(load(&image, 40 * MIB, 512), [0; 512]);
    let second = Image::open(&path, qcow2(false)).unwrap_err().to_string();
    assert!(second.contains("is locked by"), "{second}");
    assert!(std::fs::metadata(&path).unwrap().len() < 2 * MIB);
}

#[test]
fn what_a_qcow2_image_lies_on_is_opened_where_that_is_asked_for_and_never_written() {
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("base.raw"), vec![5; 8 << 20]).unwrap();
    make_qcow2(&at("middle.qcow2"), 8 * MIB, Some(("base.raw", "raw")));
    make_qcow2(&at("top.qcow2"), 8 * MIB, Some(("middle.qcow2", "qcow2")));
    let refused = Image::open(&at("top.qcow2"), qcow2(false))
        .unwrap_err()
        .to_string();
    assert!(
        refused.contains("middle.qcow2") && refused.contains("backing_files=on"),
        "{refused}"
    );
    // As many as Landlock is to leave in reach.
    let below = [at("middle.qcow2"), at("base.raw")];
    assert_eq!(backing_files(&at("top.qcow2")), below);
    assert_eq!(backing_files(&at("base.raw")), [] as [PathBuf; 0]);
    let before = std::fs::read(at("middle.qcow2")).unwrap();
    let image = open_again(&at("top.qcow2"), qcow2(true));
    store(&image, 4096, 6, 512);
    assert_eq!(load(&image, 4096 - 512, 512), [5; 512]);
    assert_eq!(load(&image, 4096, 512), [6; 512]);
    drop(image);
    assert_eq!(std::fs::read(at("middle.qcow2")).unwrap(), before);
    assert!(
        std::fs::read(at("base.raw"))
            .unwrap()
            .iter()
            .all(|byte| *byte == 5)
    );
    // On itself, without a format, and on what is no file.
    make_qcow2(&at("loop.qcow2"), 8 * MIB, Some(("loop.qcow2", "qcow2")));
    make_qcow2(&at("odd.qcow2"), 8 * MIB, Some(("base.raw", "vmdk")));
    make_qcow2(&at("node.qcow2"), 8 * MIB, Some(("/dev/null", "raw")));
    assert_eq!(backing_files(&at("loop.qcow2")).len(), 8);
    // What was written to a raw image names nothing, whatever it looks like.
    std::fs::copy(at("top.qcow2"), at("like.raw")).unwrap();
    make_qcow2(&at("on-raw.qcow2"), 8 * MIB, Some(("like.raw", "raw")));
    assert_eq!(backing_files(&at("on-raw.qcow2")), [at("like.raw")]);
    let readonly = ImageMode {
        readonly: true,
        ..qcow2(true)
    };
    for (name, what) in [
        ("loop.qcow2", "or on itself"),
        ("odd.qcow2", "no format that can be read here (vmdk)"),
        ("node.qcow2", "a character device"),
    ] {
        let error = Image::open(&at(name), readonly).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    }
}

#[test]
fn a_raw_image_that_a_guest_makes_look_like_qcow2_stays_raw() {
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let (raw, header) = (folder.path().join("disk.raw"), folder.path().join("header"));
    std::fs::write(&raw, vec![0; 1 << 20]).unwrap();
    make_qcow2(&header, 64 * MIB, Some(("/etc/passwd", "raw")));
    let bytes = std::fs::read(&header).unwrap();
    std::fs::File::options()
        .write(true)
        .open(&raw)
        .unwrap()
        .write_at(&bytes, 0)
        .unwrap();
    let image = Image::open(&raw, ImageMode::default()).unwrap();
    assert_eq!(image.capacity(), std::fs::metadata(&raw).unwrap().len());
    assert_eq!(load(&image, 0, 512), bytes[..512]);
}

#[test]
fn an_image_that_is_no_qcow2_is_not_taken_for_one() {
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = folder.path().join("disk.raw");
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    let error = Image::open(&path, qcow2(true)).unwrap_err().to_string();
    assert!(error.contains("cannot be used as a qcow2 image"), "{error}");
    // Whatever is in a header: it is refused, or opened.
    make_qcow2(&path, MIB, None);
    let whole = std::fs::read(&path).unwrap();
    for at in 0..112 {
        let mut bytes = whole.clone();
        bytes[at] ^= 0xff;
        std::fs::write(&path, &bytes).unwrap();
        if let Ok(image) = Image::open(
            &path,
            ImageMode {
                readonly: true,
                ..qcow2(false)
            },
        ) {
            let _capacity = image.capacity();
        }
    }
}

#[test]
fn a_descriptor_that_is_handed_in_is_used_as_it_is_open() {
    use std::os::fd::AsRawFd;
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = folder.path().join("disk.raw");
    std::fs::write(&path, vec![3; 1 << 20]).unwrap();
    let open = |write| {
        OpenOptions::new()
            .read(true)
            .write(write)
            .open(&path)
            .unwrap()
    };
    let mode = |file: &File, readonly| ImageMode {
        readonly,
        fd: Some(file.as_raw_fd() as u32),
        ..ImageMode::default()
    };
    let name = Path::new("fd=7");
    let (whole, half) = (open(true), open(false));
    std::fs::remove_file(&path).unwrap();
    let error = Image::open(name, mode(&half, false))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("fd=7 is a descriptor that is not open for writing"),
        "{error}"
    );
    let image = Image::open(name, mode(&whole, false)).unwrap();
    assert_eq!(load(&image, 0, 512), [3; 512]);
    let closed = ImageMode {
        fd: Some(1 << 20),
        ..ImageMode::default()
    };
    assert!(Image::open(name, closed).is_err());
}
