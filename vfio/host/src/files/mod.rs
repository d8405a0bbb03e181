//! Files that Busway makes or adds to, opened so that nobody else decides which file that is.
//!
//! A path that a person gives may lie in a folder that others can write, such as `/tmp`. Whoever runs
//! Busway, often root, must not be led from there to a file that somebody else chose: a symbolic or hard
//! link that was placed where the file was expected, or a file of somebody else's.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{
    DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _,
    PermissionsExt as _,
};
use std::path::{Component, Path, PathBuf};

use busway_iommu::effective_user;

/// The bits of a mode by which others than the owner can write. chmod(2)
const OTHERS_WRITE: u32 = 0o022;
/// How often a file that vanishes while it is opened is tried anew.
const TRIES: usize = 8;

/// Why a file is not used for output.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// it is a symbolic link: name the file that it leads to
    #[error("it is a symbolic link, which may lead anywhere: name the file that it leads to")]
    Link,
    /// it has other names (hard links): remove it, or name another file
    #[error(
        "it is one file under {names} names (hard links), and would change under all of them: \
         remove it, or name another file"
    )]
    Names {
        /// How many names it has.
        names: u64,
    },
    /// it belongs to user {owner}, and Busway runs as user {user}
    #[error(
        "it belongs to user {owner}, and Busway runs as user {user}: remove it, or name another file"
    )]
    Owner {
        /// The user id of its owner.
        owner: u32,
        /// The effective user id of this process.
        user: u32,
    },
    /// it is {what}: name a file, a pipe or a terminal
    #[error("it is {what}: name a file, a pipe or a terminal")]
    Kind {
        /// What it is, with its article.
        what: &'static str,
    },
    /// The answer of the file system, and what helps where it has no room.
    #[error("{}{}", .0, no_room(.0))]
    Io(#[from] io::Error),
}

impl OutputError {
    /// Whether the file system has no room for the file, or none for its user.
    #[must_use]
    pub fn is_want(&self) -> bool {
        matches!(self, Self::Io(error) if is_no_room(error))
    }
}

/// Whether an error is that a file system has no room left, or none for this user (ENOSPC, EDQUOT).
#[must_use]
pub fn is_no_room(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

/// What helps where a file system has no room, to be put behind the error; empty for all other errors.
#[must_use]
pub fn no_room(error: &io::Error) -> &'static str {
    match is_no_room(error) {
        true => {
            "; there is no room left on that file system, or none for this user: see df, df -i and quota"
        }
        false => "",
    }
}

/// What becomes of a regular file that is there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// It is kept, and output goes to its end.
    Append,
    /// It is emptied.
    Empty,
}

/// An opened file.
#[derive(Debug)]
pub struct Output {
    /// Open for writing; what is regular is open for appending.
    pub file: File,
    /// A regular file that is reached by its own name, and can be given another. Pipes, terminals and
    /// descriptors that the process has inherited (`/dev/stderr`) are not.
    pub named: bool,
}

/// Opens the file at `path` for output.
///
/// Where there is none, it is created, with `O_EXCL`. Where there is one, it must be a regular file of
/// the effective user's with a single name, or a pipe or character device of the user's or of root's; a
/// symbolic link is not followed. `/dev/stdin`, `/dev/stdout`, `/dev/stderr`, `/dev/fd/N` and
/// `/proc/self/fd/N` name what the process was given and are taken as they are.
///
/// # Errors
///
/// Where it is none of these, or the file system refuses.
pub fn open_output(path: &Path, existing: Existing) -> Result<Output, OutputError> {
    if is_inherited(path) {
        let file = OpenOptions::new()
            .append(true)
            .custom_flags(libc::O_NOCTTY)
            .open(path)?;
        return Ok(Output { file, named: false });
    }
    for _ in 0..TRIES {
        match create_new(path, 0o666) {
            Ok(file) => return Ok(Output { file, named: true }),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error.into()),
        }
        match open_existing(path, existing) {
            // It was removed between the two.
            Err(OutputError::Io(error)) if error.kind() == io::ErrorKind::NotFound => {}
            opened => return opened,
        }
    }
    Err(io::Error::from(io::ErrorKind::NotFound).into())
}

/// Creates a file that nobody else can have placed there, for appending.
///
/// # Errors
///
/// `EEXIST` where anything has that name, a link that leads nowhere included; else the file system's.
pub fn create_new(path: &Path, mode: u32) -> io::Result<File> {
    OpenOptions::new()
        .append(true)
        .create_new(true)
        .mode(mode)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
}

/// Whether what is at `path`, if anything is, can be used for output; nothing is opened or made.
///
/// # Errors
///
/// As [`open_output`].
pub fn check_output(path: &Path) -> Result<(), OutputError> {
    match inspect(path) {
        _ if is_inherited(path) => Ok(()),
        Err(OutputError::Io(error)) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        inspected => inspected.map(drop),
    }
}

fn open_existing(path: &Path, existing: Existing) -> Result<Output, OutputError> {
    let (place, named) = inspect(path)?;
    let file = OpenOptions::new()
        .append(true)
        .custom_flags(libc::O_NOCTTY)
        .open(by_descriptor(&place))?;
    if named && existing == Existing::Empty {
        file.set_len(0)?;
    }
    Ok(Output { file, named })
}

/// What is there and may be used, and whether it is a regular file. It is looked at by a descriptor that
/// can neither read nor write it, so that nothing happens to what is not to be used.
fn inspect(path: &Path) -> Result<(File, bool), OutputError> {
    let place = look(path)?;
    let there = place.metadata()?;
    let kind = there.file_type();
    let (owner, user) = (there.uid(), effective_user());
    let named = kind.is_file();
    if kind.is_symlink() {
        return Err(OutputError::Link);
    }
    if named && owner == user && there.nlink() > 1 {
        let names = there.nlink();
        return Err(OutputError::Names { names });
    }
    let what = match () {
        () if kind.is_dir() => Some("a folder"),
        () if kind.is_socket() => Some("a socket"),
        () if kind.is_block_device() => Some("a disk"),
        () => None,
    };
    if let Some(what) = what {
        return Err(OutputError::Kind { what });
    }
    // Terminals and /dev/null are the system's.
    if owner != user && (named || owner != 0) {
        return Err(OutputError::Owner { owner, user });
    }
    Ok((place, named))
}

/// A descriptor that says what is at `path`, and no more; of a link the link.
fn look(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
        .open(path)
}

/// The name by which the very file of a descriptor can be opened. proc_pid_fd(5)
fn by_descriptor(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Whether a path names a descriptor of the process. There, links lead to what is open already.
fn is_inherited(path: &Path) -> bool {
    if ["/dev/stdin", "/dev/stdout", "/dev/stderr"]
        .map(Path::new)
        .contains(&path)
    {
        return true;
    }
    let in_folder = |folder: &str| {
        let mut rest = path.strip_prefix(folder).ok()?.components();
        match (rest.next(), rest.next()) {
            (Some(Component::Normal(number)), None) => number.to_str()?.parse::<u32>().ok(),
            _ => None,
        }
    };
    in_folder("/dev/fd").is_some() || in_folder("/proc/self/fd").is_some()
}

/// Replaces a file by one that holds `bytes`, so that at any time the old or the new one is there, whole.
/// A link at `path` is replaced, not followed. The new file's mode is 0666 less the umask.
///
/// `beside` is the name that the new file has first, in the same folder: what an earlier process of the
/// same user left there is removed.
///
/// # Errors
///
/// The file system's, among them `EEXIST` where somebody else has something at `beside`.
pub fn replace(path: &Path, beside: &Path, bytes: &[u8]) -> io::Result<()> {
    put_in_place(path, beside, 0o666, |file| file.write_all(bytes))
}

/// As [`replace`]; the new file has just this `mode`, whatever the umask, and is on the disk before it
/// has its name.
pub(crate) fn replace_for_good(
    path: &Path,
    beside: &Path,
    bytes: &[u8],
    mode: u32,
) -> io::Result<()> {
    put_in_place(path, beside, mode, |file| {
        file.set_permissions(Permissions::from_mode(mode))?;
        file.write_all(bytes)?;
        file.sync_all()
    })
}

fn put_in_place(
    path: &Path,
    beside: &Path,
    mode: u32,
    write: impl FnOnce(&mut File) -> io::Result<()>,
) -> io::Result<()> {
    let mut file = match create_new(beside, mode) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let left = fs::symlink_metadata(beside)?;
            if !left.is_file() || left.uid() != effective_user() {
                return Err(error);
            }
            fs::remove_file(beside)?;
            create_new(beside, mode)?
        }
        created => created?,
    };
    let written = write(&mut file).and_then(|()| fs::rename(beside, path));
    written.inspect_err(|_| {
        // What is left of it is of no use.
        let _ = fs::remove_file(beside);
    })
}

/// Why a file or folder of Busway's own is not trusted.
#[derive(Debug, thiserror::Error)]
pub enum OwnError {
    /// it belongs to user {owner}, and this is user {user}
    #[error("it belongs to user {owner}, and this is user {user}")]
    Owner {
        /// The user id of its owner.
        owner: u32,
        /// The effective user id of this process.
        user: u32,
    },
    /// others can write it (mode {mode})
    #[error("others than its owner can write it (mode {mode:03o})")]
    Mode {
        /// Its permission bits.
        mode: u32,
    },
    /// it is not {what}
    #[error("it is not {what}")]
    Kind {
        /// What it should be, with its article.
        what: &'static str,
    },
    /// The answer of the file system.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl OwnError {
    /// What makes it usable.
    #[must_use]
    pub fn remedy(&self, path: &Path) -> String {
        let path = path.display();
        match self {
            Self::Owner { owner: 0, .. } => "only root may see to it: run it with sudo".to_owned(),
            Self::Io(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                "only root may see to it: run it with sudo".to_owned()
            }
            Self::Io(error) if is_no_room(error) => {
                format!(
                    "there is no room left on its file system, or none for this user: df {path}; df -i {path}; quota"
                )
            }
            Self::Io(_) => format!("see what is there: ls -ld {path}"),
            Self::Owner { .. } | Self::Mode { .. } | Self::Kind { .. } => format!(
                "somebody else may have written what it says: see what is there (ls -la {path}), and \
                 remove it as root"
            ),
        }
    }
}

/// Makes the folder at `path` where there is none, and has it closed to all but this user, whatever the
/// umask and whoever made it.
///
/// # Errors
///
/// Where it is somebody else's, a link, or others could have put something into it.
pub(crate) fn make_own_folder(path: &Path) -> Result<(), OwnError> {
    if let Some(above) = path.parent() {
        fs::create_dir_all(above)?;
    }
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error.into()),
        _ => {}
    }
    match own_folder(path)? {
        Some(folder) => close(&folder, 0o700),
        None => Err(io::Error::from(io::ErrorKind::NotFound).into()),
    }
}

/// The folder at `path`, where there is one; an error as of [`make_own_folder`].
pub(crate) fn own_folder(path: &Path) -> Result<Option<File>, OwnError> {
    let folder = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW)
        .open(path);
    let folder = match folder {
        Ok(folder) => folder,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        // A link is told so, for O_DIRECTORY finds it to be none. open(2)
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTDIR | libc::ELOOP)) => {
            let what = "a folder";
            return Err(OwnError::Kind { what });
        }
        Err(error) => return Err(error.into()),
    };
    check_own(&folder)?;
    Ok(Some(folder))
}

/// Opens a file in a folder of this user's own by `options`, and has it closed to all others.
///
/// # Errors
///
/// Where it is a link, not a regular file, somebody else's, or others could have written it.
pub(crate) fn open_own(path: &Path, options: &mut OpenOptions) -> Result<File, OwnError> {
    let what = "a regular file";
    let file = options
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
        .map_err(|error| match error.raw_os_error() {
            Some(libc::ELOOP) => OwnError::Kind { what },
            _ => error.into(),
        })?;
    let there = file.metadata()?;
    if !there.is_file() || there.nlink() > 1 {
        return Err(OwnError::Kind { what });
    }
    check_own(&file)?;
    close(&file, 0o600)?;
    Ok(file)
}

fn check_own(file: &File) -> Result<(), OwnError> {
    let there = file.metadata()?;
    let (owner, user) = (there.uid(), effective_user());
    if owner != user {
        return Err(OwnError::Owner { owner, user });
    }
    match there.mode() & 0o7777 {
        mode if mode & OTHERS_WRITE != 0 => Err(OwnError::Mode { mode }),
        _ => Ok(()),
    }
}

fn close(file: &File, mode: u32) -> Result<(), OwnError> {
    if file.metadata()?.mode() & 0o7777 != mode {
        file.set_permissions(Permissions::from_mode(mode))?;
    }
    Ok(())
}

/// Opens a character device for nothing but its attributes, and never by a link.
///
/// # Errors
///
/// `ELOOP` for a link, `ENODEV` for what is no character device, else the file system's.
pub(crate) fn open_node(path: &Path) -> io::Result<File> {
    let node = look(path)?;
    let kind = node.metadata()?.file_type();
    if kind.is_symlink() {
        return Err(io::Error::from_raw_os_error(libc::ELOOP));
    }
    match kind.is_char_device() {
        true => Ok(node),
        false => Err(io::Error::from_raw_os_error(libc::ENODEV)),
    }
}

#[cfg(test)]
mod tests;
