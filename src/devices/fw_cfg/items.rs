//! What firmware can read: items by number, and files by name.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;

use busway_pci::Complaints;

// Numbers of items. QEMU include/standard-headers/linux/qemu_fw_cfg.h and hw/nvram/fw_cfg.h.
const SIGNATURE: u16 = 0x00;
const FEATURES: u16 = 0x01;
const DIRECTORY: u16 = 0x19;
const FIRST_FILE: u16 = 0x20;
/// Numbers above are not for files.
const FILES_MAX: usize = 0x1000;
/// A number without the bit that says that the item is written to. With bit 15 it is an item of the board's own, of which there
/// is none: SeaBIOS asks for some. QEMU hw/nvram/fw_cfg.c, `fw_cfg_select`
const ITEM_MASK: u16 = 0xbfff;

/// The interface by ports, and that by DMA. "Revision / feature bitmap".
const FEATURE_BITS: u32 = 0b11;

/// Failures to read a file that are warnings; the guest can have any number.
const LOUD_COMPLAINTS: u32 = 4;

/// Bytes of a file's name in the directory, the zero at the end included. "File Directory".
const NAME_SIZE: usize = 56;

/// What an item holds.
pub enum Content {
    /// These bytes.
    Bytes(Vec<u8>),
    /// Bytes that are made whenever the item is selected; they are cut or filled up with zeros to `size`.
    Made {
        /// How many they are.
        size: usize,
        /// Makes them.
        make: Box<dyn Fn() -> Vec<u8> + Send + Sync>,
    },
    /// A part of a file, which is read when the guest reads it.
    File {
        /// The file.
        file: File,
        /// Where the part begins.
        offset: u64,
        /// Its bytes.
        size: u64,
    },
}

impl fmt::Debug for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.size())
    }
}

impl Content {
    fn size(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Made { size, .. } => *size as u64,
            Self::File { size, .. } => *size,
        }
    }
}

impl From<u16> for Content {
    fn from(value: u16) -> Self {
        Self::Bytes(value.to_le_bytes().to_vec())
    }
}

impl From<u32> for Content {
    fn from(value: u32) -> Self {
        Self::Bytes(value.to_le_bytes().to_vec())
    }
}

/// Why an item cannot be offered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ItemsError {
    /// firmware cannot be given the file {0}: a name has 55 bytes at most
    #[error("firmware cannot be given the file {0}: a name has 55 bytes at most")]
    LongName(String),
    /// firmware cannot be given the file {0}: there are too many, or one of {1} bytes is too large
    #[error("firmware cannot be given the file {0} of {1} bytes: it is too large, or one too many")]
    TooMuch(String, u64),
}

/// All that firmware can read.
#[derive(Debug)]
pub struct Items {
    items: BTreeMap<u16, Content>,
    names: Vec<String>,
    complaints: Complaints,
}

impl Default for Items {
    fn default() -> Self {
        let mut items = BTreeMap::new();
        items.insert(SIGNATURE, Content::Bytes(b"QEMU".to_vec()));
        items.insert(FEATURES, FEATURE_BITS.into());
        Self {
            items,
            names: Vec::new(),
            complaints: Complaints::first(LOUD_COMPLAINTS),
        }
    }
}

impl Items {
    /// Offers an item by its number.
    pub fn item(&mut self, number: u16, content: impl Into<Content>) {
        self.items.insert(number, content.into());
    }

    /// Offers a file.
    ///
    /// # Errors
    /// [`ItemsError`]: the directory cannot list it.
    pub fn file(&mut self, name: &str, content: impl Into<Content>) -> Result<(), ItemsError> {
        let content = content.into();
        if name.len() >= NAME_SIZE {
            return Err(ItemsError::LongName(name.to_owned()));
        }
        if self.names.len() >= FILES_MAX || content.size() > u32::MAX.into() {
            return Err(ItemsError::TooMuch(name.to_owned(), content.size()));
        }
        let number = FIRST_FILE + self.names.len() as u16;
        self.items.insert(number, content);
        self.names.push(name.to_owned());
        Ok(())
    }

    /// The bytes of an item that are made when it is selected.
    pub(super) fn make(&self, number: u16) -> Option<Vec<u8>> {
        let number = number & ITEM_MASK;
        if number == DIRECTORY {
            return Some(self.directory());
        }
        match self.items.get(&number)? {
            Content::Made { size, make } => {
                let mut bytes = make();
                bytes.resize(*size, 0);
                Some(bytes)
            }
            Content::Bytes(_) | Content::File { .. } => None,
        }
    }

    /// How many bytes an item has that is not made.
    pub(super) fn size(&self, number: u16) -> u64 {
        let item = self.items.get(&(number & ITEM_MASK));
        item.map_or(0, Content::size)
    }

    /// Reads an item that is not made, from `offset` on; leaves what is behind its end as it is.
    pub(super) fn read(&self, number: u16, offset: u64, data: &mut [u8]) {
        match self.items.get(&(number & ITEM_MASK)) {
            Some(Content::Bytes(bytes)) => {
                let rest = usize::try_from(offset)
                    .ok()
                    .and_then(|offset| bytes.get(offset..))
                    .unwrap_or_default();
                for (to, from) in data.iter_mut().zip(rest) {
                    *to = *from;
                }
            }
            Some(Content::File {
                file,
                offset: start,
                size,
            }) => {
                let left = usize::try_from(size.saturating_sub(offset)).unwrap_or(usize::MAX);
                let length = data.len().min(left);
                let Some(data) = data.get_mut(..length) else {
                    return;
                };
                if let Err(error) = file.read_exact_at(data, start.saturating_add(offset)) {
                    log::log!(
                        self.complaints.next(log::Level::Warn),
                        "fw_cfg: a file that firmware reads cannot be read: {error}"
                    );
                }
            }
            Some(Content::Made { .. }) | None => {}
        }
    }

    /// The directory: a count, then size, number, nothing, and name of each file, sorted by name as QEMU
    /// has them; big-endian. "File Directory".
    fn directory(&self) -> Vec<u8> {
        let mut files: Vec<_> = self.names.iter().zip(FIRST_FILE..).collect();
        files.sort();
        let mut bytes = (files.len() as u32).to_be_bytes().to_vec();
        for (name, number) in files {
            bytes.extend((self.size(number) as u32).to_be_bytes());
            bytes.extend(number.to_be_bytes());
            bytes.extend([0; 2]);
            let end = bytes.len() + NAME_SIZE;
            bytes.extend(name.as_bytes());
            bytes.resize(end, 0);
        }
        bytes
    }
}
