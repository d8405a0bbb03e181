//! A function's expansion ROM: the device's own, read when it is first asked for and kept once that went
//! well, or an image from a file.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use busway_pci::spec;

use crate::aer::is_silent;
use crate::{DeviceIo, RegionIndex};

/// The largest there is. PCIe 6.0 §7.5.1.2.4
const MOST: u64 = 16 << 20;

/// How long it is left alone when it could not be read: a guest asks for it four bytes at a time.
const PAUSE: Duration = Duration::from_secs(1);

/// What an image begins with. PCI Firmware Specification 3.3 §5.1
const SIGNATURE: [u8; 2] = [0x55, 0xaa];

/// What a guest finds as a device's expansion ROM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum RomChoice {
    /// The device's own, unless that is known to do harm.
    #[default]
    Auto,
    /// The device's own, in any case.
    Device,
    /// The one of a file.
    Image(RomImage),
    /// None.
    None,
}

/// An image from a file, padded to a power of two.
#[derive(Clone, PartialEq, Eq)]
pub struct RomImage(Arc<[u8]>);

impl std::fmt::Debug for RomImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RomImage({} bytes)", self.0.len())
    }
}

/// An image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RomError {
    /// romfile={path} cannot be read: {source}
    #[error("romfile={path} cannot be read: {source}", path = .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// romfile={path} is no plain file
    #[error(
        "romfile={path} is no plain file: copy the image to one (a device's own is in its `rom` in \
         sysfs)",
        path = .path.display()
    )]
    NoFile {
        /// What was given.
        path: PathBuf,
    },
    /// romfile={path} is empty: give a ROM's image, or `rom=off` for none
    #[error("romfile={path} is empty: give a ROM's image, or rom=off for none", path = .path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// romfile={path} has {size} bytes, more than the 16 MiB that an expansion ROM can have
    #[error(
        "romfile={path} has {size} bytes, more than the 16 MiB that an expansion ROM can have: give \
         the ROM's image alone",
        path = .path.display()
    )]
    Large {
        /// The file.
        path: PathBuf,
        /// Its bytes.
        size: u64,
    },
}

impl RomImage {
    /// Reads an image.
    ///
    /// # Errors
    /// [`RomError`]
    pub fn load(path: &Path) -> Result<Self, RomError> {
        let owned = || path.to_owned();
        let read = |source| RomError::Read {
            path: owned(),
            source,
        };
        // A pipe would be waited for, and sysfs's `rom` has to be enabled first.
        let metadata = std::fs::metadata(path).map_err(read)?;
        if !metadata.is_file() {
            return Err(RomError::NoFile { path: owned() });
        }
        let mut bytes = Vec::new();
        let file = File::open(path).map_err(read)?;
        file.take(MOST + 1).read_to_end(&mut bytes).map_err(read)?;
        if bytes.is_empty() {
            return Err(RomError::Empty { path: owned() });
        }
        if bytes.len() as u64 > MOST {
            let size = metadata.len().max(MOST + 1);
            return Err(RomError::Large {
                path: owned(),
                size,
            });
        }
        if !bytes.starts_with(&SIGNATURE) {
            log::warn!(
                "romfile={} does not begin with 55 AA, as a ROM's image does: the guest will hardly \
                 know what to do with it",
                path.display()
            );
        }
        let size = bytes.len().next_power_of_two().max(spec::ROM_MIN as usize);
        bytes.resize(size, u8::MAX);
        Ok(Self(bytes.into()))
    }

    /// Bytes, a power of two.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.0.len() as u64
    }
}

/// A function's ROM.
#[derive(Debug)]
pub(crate) struct Rom {
    size: u64,
    content: Mutex<Content>,
}

/// What a ROM reads.
#[derive(Debug)]
enum Content {
    Known(Arc<[u8]>),
    Unknown {
        /// When it was last tried in vain.
        tried: Option<Instant>,
    },
}

impl Rom {
    /// The one of that `choice`, for a device whose own `does_harm` or does not.
    pub(crate) fn new(
        name: &str,
        io: &dyn DeviceIo,
        choice: &RomChoice,
        does_harm: Option<&str>,
    ) -> Option<Self> {
        let size = io.region(RegionIndex::ROM).size;
        match (choice, does_harm) {
            (RomChoice::None, _) => return None,
            (RomChoice::Image(image), _) => {
                return Some(Self {
                    size: image.0.len() as u64,
                    content: Mutex::new(Content::Known(image.0.clone())),
                });
            }
            (RomChoice::Auto, Some(why)) if size > 0 => {
                log::warn!("{name}: its ROM is hidden: {why}; rom=on gives it nevertheless");
                return None;
            }
            (RomChoice::Auto | RomChoice::Device, _) => {}
        }
        if size == 0 {
            return None;
        }
        if !size.is_power_of_two() || !(spec::ROM_MIN..=MOST).contains(&size) {
            log::warn!("{name}: its ROM is hidden: it cannot have {size:#x} bytes");
            return None;
        }
        Some(Self {
            size,
            content: Mutex::new(Content::Unknown { tried: None }),
        })
    }

    /// Bytes; a power of two.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Reads, `offset` bytes from its start; ones beyond its end. The device's own is taken out of it
    /// the first time, while it is awake.
    pub(crate) fn read(&self, name: &str, io: &dyn DeviceIo, offset: u64, data: &mut [u8]) {
        data.fill(u8::MAX);
        let Some(content) = self.content(name, io) else {
            return;
        };
        let rest = usize::try_from(offset)
            .ok()
            .and_then(|at| content.get(at..));
        for (byte, value) in data.iter_mut().zip(rest.unwrap_or_default()) {
            *byte = *value;
        }
    }

    /// What is in it, where that is known or can be read now.
    fn content(&self, name: &str, io: &dyn DeviceIo) -> Option<Arc<[u8]>> {
        let mut content = self.content.lock().unwrap_or_else(PoisonError::into_inner);
        let before = match &*content {
            Content::Known(known) => return Some(known.clone()),
            Content::Unknown { tried } => *tried,
        };
        if before.is_some_and(|tried| tried.elapsed() < PAUSE) {
            return None;
        }
        let level = match before {
            None => log::Level::Warn,
            Some(_) => log::Level::Debug,
        };
        let loaded = self.load(name, io, level).map(Arc::<[u8]>::from);
        *content = match &loaded {
            Some(loaded) => Content::Known(loaded.clone()),
            // It may have taken long.
            None => Content::Unknown {
                tried: Some(Instant::now()),
            },
        };
        loaded
    }

    /// VFIO fills what the image leaves free with ones. A device that does not answer reads ones as
    /// well, slowly.
    fn load(&self, name: &str, io: &dyn DeviceIo, level: log::Level) -> Option<Vec<u8>> {
        let mut content = vec![u8::MAX; self.size as usize];
        let read = match is_silent(io) {
            true => Err(io::Error::other("it does not answer")),
            false => io.region_read(RegionIndex::ROM, 0, &mut content),
        };
        match read {
            Ok(()) if content.starts_with(&SIGNATURE) => {
                log::debug!("{name}: {} KiB of ROM read", self.size >> 10);
            }
            Ok(()) if is_silent(io) => return None,
            Ok(()) => log::info!("{name}: its ROM holds no image"),
            Err(error) => {
                log::log!(
                    level,
                    "{name}: its ROM cannot be read ({error}), and is empty for the guest meanwhile; \
                     romfile= takes an image instead"
                );
                return None;
            }
        }
        Some(content)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::fake::FakeDevice;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path =
                std::env::temp_dir().join(format!("busway-rom-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
            let path = self.0.join(name);
            std::fs::write(&path, bytes).unwrap();
            path
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_rom_that_could_not_be_read_is_tried_again_and_not_at_each_access() {
        let mut fake = FakeDevice {
            rom: vec![0x55; 2048],
            ..FakeDevice::default()
        };
        fake.rom[1] = 0xaa;
        let mut rom = Rom::new("fake", &fake, &RomChoice::Device, None).unwrap();
        let read = |rom: &Rom| {
            let mut data = [0; 2];
            rom.read("fake", &fake, 0, &mut data);
            (data, *fake.rom_reads.lock().unwrap())
        };
        fake.silent.store(true, Ordering::Relaxed);
        assert_eq!(read(&rom), ([0xff; 2], 0));
        fake.silent.store(false, Ordering::Relaxed);
        assert_eq!(read(&rom), ([0xff; 2], 0));
        let Content::Unknown { tried: Some(tried) } = rom.content.get_mut().unwrap() else {
            panic!("it is known");
        };
        *tried = tried.checked_sub(PAUSE).unwrap();
        assert_eq!(read(&rom), ([0x55, 0xaa], 1));
        assert_eq!(read(&rom), ([0x55, 0xaa], 1));
    }

    #[test]
    fn an_image_is_padded_to_a_power_of_two_with_ones() {
        let folder = Folder::new("padded");
        let small = RomImage::load(&folder.file("small", &[0x55, 0xaa, 3])).unwrap();
        assert_eq!(small.0.len(), 2048);
        assert_eq!(small.0[..4], [0x55, 0xaa, 3, 0xff]);
        let exact = RomImage::load(&folder.file("exact", &[0x55; 4096])).unwrap();
        assert_eq!(exact.0.len(), 4096);
        let odd = RomImage::load(&folder.file("odd", &[0x55; 4097])).unwrap();
        assert_eq!((odd.0.len(), odd.0[4096], odd.0[4097]), (8192, 0x55, 0xff));
    }

    #[test]
    fn what_is_no_image_is_refused_with_the_reason() {
        let folder = Folder::new("refused");
        let refuse = |path: &Path| RomImage::load(path).unwrap_err().to_string();
        assert!(refuse(&folder.0).contains("no plain file"));
        assert!(refuse(&folder.0.join("absent")).contains("No such file"));
        assert!(refuse(&folder.file("empty", &[])).contains("rom=off"));
        let large = folder.0.join("large");
        File::create(&large).unwrap().set_len(MOST + 5).unwrap();
        assert!(refuse(&large).contains("16777221 bytes"));
        File::create(&large).unwrap().set_len(MOST).unwrap();
        assert_eq!(RomImage::load(&large).unwrap().0.len() as u64, MOST);
    }
}
