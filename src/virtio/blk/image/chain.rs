//! Which files a qcow2 image lies on, read from the images' headers before any of them is opened to be used: what Landlock
//! is to leave in reach.
//!
//! `imago` opens them later, and says what is wrong with them. Here a header that is none ends the chain, and so does a file
//! that the one above does not call qcow2: what a guest wrote to a raw image names nothing.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _};
use std::path::{Path, PathBuf};

use super::qcow2::{MOST_BACKING, beside};

/// `QFI\xfb`. QEMU's docs/interop/qcow2.rst, Header
const MAGIC: &[u8] = b"QFI\xfb";
/// Bytes at an image's start that its header and the header's extensions lie in, as far as they are looked at.
const START: usize = 4096;
/// Most bytes of a backing file's name. The same
const MOST_NAME: usize = 1023;
/// Bytes of a header of version 2; later ones say theirs.
const HEADER_OF_2: usize = 72;
/// The header's extension with the backing file's format. The same, Header extensions
const FORMAT: u32 = 0xe279_2aca;

/// What an image lies on.
struct Backing {
    name: String,
    /// It is another image of this format, as far as this one says.
    is_qcow2: bool,
}

/// The files below the image at `path`, the next one first, as far as they can be read and as many as are opened at most.
pub(crate) fn backing_files(path: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = Vec::new();
    while files.len() < MOST_BACKING {
        let above = files.last().map_or(path, PathBuf::as_path);
        let Some(backing) = backing(above) else {
            break;
        };
        files.push(beside(above, &backing.name));
        if !backing.is_qcow2 {
            break;
        }
    }
    files
}

fn backing(image: &Path) -> Option<Backing> {
    // Asked before opening: opening a FIFO would wait for its writer.
    let kind = fs::metadata(image).ok()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return None;
    }
    let file = File::open(image).ok()?;
    let mut start = vec![0; START];
    let count = file.read_at(&mut start, 0).ok()?;
    start.truncate(count);
    let length = usize::try_from(u32_at(&start, 16)?).ok()?;
    if !start.starts_with(MAGIC) || !(1..=MOST_NAME).contains(&length) {
        return None;
    }
    let (high, low) = (u32_at(&start, 8)?, u32_at(&start, 12)?);
    let mut name = vec![0; length];
    let place = u64::from(high) << 32 | u64::from(low);
    file.read_exact_at(&mut name, place).ok()?;
    Some(Backing {
        name: String::from_utf8(name).ok()?,
        is_qcow2: format(&start) == Some(b"qcow2"),
    })
}

/// What the header's extensions say that the backing file is.
fn format(start: &[u8]) -> Option<&[u8]> {
    let mut at = match u32_at(start, 4)? {
        2 => HEADER_OF_2,
        _ => usize::try_from(u32_at(start, 100)?).ok()?,
    };
    loop {
        let kind = u32_at(start, at)?;
        let length = usize::try_from(u32_at(start, at.checked_add(4)?)?).ok()?;
        let data = at.checked_add(8)?;
        match kind {
            0 => return None,
            FORMAT => return start.get(data..data.checked_add(length)?),
            // Each has 8 bytes of its own at least, so that this ends with the start.
            _ => at = data.checked_add(length)?.checked_next_multiple_of(8)?,
        }
    }
}

/// A number of 32 bits, the highest first.
fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_be_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn whatever_a_header_says_the_chain_ends(
            numbers in vec(any::<u32>(), 32),
            small in vec(0..256_u32, 32),
            mask in any::<u32>(),
            rest in vec(any::<u8>(), 0..512),
        ) {
            let folder = tempfile::tempdir().unwrap();
            let image = folder.path().join("image");
            let mut bytes = MAGIC.to_vec();
            for (bit, (number, small)) in numbers.iter().zip(&small).enumerate() {
                let number = if mask >> bit & 1 == 0 { small } else { number };
                bytes.extend(number.to_be_bytes());
            }
            bytes.extend(rest);
            fs::write(&image, bytes).unwrap();
            prop_assert!(backing_files(&image).len() <= MOST_BACKING);
        }
    }
}
