use super::*;
use std::io::Write;

fn open(path: &Path, readonly: bool) -> Result<Image, ImageError> {
    Image::open(
        path,
        Mode {
            readonly,
            direct: false,
        },
    )
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
