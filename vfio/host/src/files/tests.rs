use std::os::unix::fs::{fchown, symlink};
use std::process::{Command, Stdio};

use tempfile::TempDir;

use super::*;

/// nobody's user id, as Debian and others have it.
const NOBODY: u32 = 65534;

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}

/// Whether files can be given to somebody else here; says so where not.
fn is_root() -> bool {
    let is_root = effective_user() == 0;
    if !is_root {
        eprintln!("skipped: only root can give files away");
    }
    is_root
}

fn give_to_nobody(path: &Path) {
    fchown(File::open(path).unwrap(), Some(NOBODY), None).unwrap();
}

/// Runs a command as nobody; `None`, said, where that is not possible here.
fn as_nobody(command: &[&str]) -> Option<bool> {
    if !is_root() {
        return None;
    }
    let ids = [format!("--reuid={NOBODY}"), format!("--regid={NOBODY}")];
    let nobody = |command: &[&str]| {
        Command::new("setpriv")
            .args(&ids)
            .arg("--clear-groups")
            .args(command)
            .stdin(Stdio::null())
            .output()
    };
    match nobody(&["true"]) {
        Ok(output) if output.status.success() => {}
        other => {
            eprintln!("skipped: nothing can be run as nobody here: {other:?}");
            return None;
        }
    }
    Some(nobody(command).unwrap().status.success())
}

fn write(output: Output, text: &str) {
    let Output { mut file, .. } = output;
    file.write_all(text.as_bytes()).unwrap();
}

#[test]
fn output_is_created_and_what_is_there_is_kept_or_emptied() {
    let folder = folder();
    let path = folder.path().join("log");
    for (existing, expected) in [
        (Existing::Append, "x"),
        (Existing::Append, "xx"),
        (Existing::Empty, "x"),
    ] {
        let output = open_output(&path, existing).unwrap();
        assert!(output.named);
        write(output, "x");
        assert_eq!(text(&path), expected);
    }
}

#[test]
fn output_follows_no_link_and_what_it_leads_to_stays_as_it_was() {
    let folder = folder();
    let victim = folder.path().join("victim");
    fs::write(&victim, "secret").unwrap();
    let link = folder.path().join("log");
    symlink(&victim, &link).unwrap();
    let nowhere = folder.path().join("nowhere");
    symlink(folder.path().join("made"), &nowhere).unwrap();
    for existing in [Existing::Append, Existing::Empty] {
        for path in [&link, &nowhere] {
            let error = open_output(path, existing).unwrap_err();
            assert!(matches!(error, OutputError::Link), "{error}");
        }
    }
    let hard = folder.path().join("hard");
    fs::hard_link(&victim, &hard).unwrap();
    let error = open_output(&hard, Existing::Empty).unwrap_err();
    assert!(matches!(error, OutputError::Names { names: 2 }), "{error}");
    assert_eq!(text(&victim), "secret");
    assert!(!folder.path().join("made").exists());
}

#[test]
fn output_goes_to_no_folder_and_no_socket() {
    let folder = folder();
    let socket = folder.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    for path in [folder.path(), &socket] {
        let error = open_output(path, Existing::Append).unwrap_err();
        assert!(matches!(error, OutputError::Kind { .. }), "{error}");
    }
    let absent = open_output(&folder.path().join("a/b"), Existing::Append).unwrap_err();
    assert!(matches!(absent, OutputError::Io(_)), "{absent}");
}

#[test]
fn output_goes_to_devices_and_to_what_was_inherited() {
    for name in ["/dev/null", "/dev/stderr", "/proc/self/fd/2"] {
        let output = open_output(Path::new(name), Existing::Empty).unwrap();
        assert!(!output.named, "{name}");
    }
    let folder = folder();
    let path = folder.path().join("inherited");
    fs::write(&path, "kept;").unwrap();
    let file = OpenOptions::new().append(true).open(&path).unwrap();
    let name = format!("/dev/fd/{}", file.as_raw_fd());
    write(
        open_output(Path::new(&name), Existing::Empty).unwrap(),
        "more",
    );
    assert_eq!(text(&path), "kept;more");
    for path in ["/dev/fd/../null", "/dev/fd/x", "/dev/fd/1/2", "/dev/shm/1"] {
        assert!(!is_inherited(Path::new(path)), "{path}");
    }
}

#[test]
fn output_goes_to_nobody_elses_file() {
    let folder = folder();
    let path = folder.path().join("log");
    fs::write(&path, "theirs").unwrap();
    if !is_root() {
        return;
    }
    give_to_nobody(&path);
    for existing in [Existing::Append, Existing::Empty] {
        let error = open_output(&path, existing).unwrap_err();
        assert!(
            matches!(
                error,
                OutputError::Owner {
                    owner: NOBODY,
                    user: 0
                }
            ),
            "{error}"
        );
    }
    assert_eq!(text(&path), "theirs");
}

#[test]
fn what_is_replaced_is_the_name_and_never_what_a_link_leads_to() {
    let folder = folder();
    let victim = folder.path().join("victim");
    fs::write(&victim, "secret").unwrap();
    let (path, beside) = (folder.path().join("report"), folder.path().join("beside"));
    symlink(&victim, &path).unwrap();
    replace(&path, &beside, b"one").unwrap();
    assert!(!fs::symlink_metadata(&path).unwrap().is_symlink());
    // A link where the new file comes first is not written through.
    symlink(&victim, &beside).unwrap();
    let error = replace(&path, &beside, b"two").unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
    assert_eq!(
        (text(&path).as_str(), text(&victim).as_str()),
        ("one", "secret")
    );
    // What a process of this user's left when it was killed goes.
    fs::remove_file(&beside).unwrap();
    fs::write(&beside, "half of").unwrap();
    replace_for_good(&path, &beside, b"three", 0o640).unwrap();
    assert_eq!((text(&path).as_str(), mode(&path)), ("three", 0o640));
    assert!(!beside.exists());
}

#[test]
fn what_others_leave_where_a_new_file_comes_first_is_not_touched() {
    let folder = folder();
    let (path, beside) = (folder.path().join("report"), folder.path().join("beside"));
    fs::write(&beside, "theirs").unwrap();
    if !is_root() {
        return;
    }
    give_to_nobody(&beside);
    replace(&path, &beside, b"mine").unwrap_err();
    assert_eq!(text(&beside), "theirs");
    assert!(!path.exists());
}

#[test]
fn an_own_folder_is_closed_to_others_whoever_made_it_and_however() {
    let root = folder();
    let path = root.path().join("run/busway");
    make_own_folder(&path).unwrap();
    assert_eq!(mode(&path), 0o700);
    for readable in [0o755, 0o711, 0o500] {
        set_mode(&path, readable);
        make_own_folder(&path).unwrap();
        assert_eq!(mode(&path), 0o700);
    }
    for writable in [0o775, 0o757, 0o1777] {
        set_mode(&path, writable);
        let error = make_own_folder(&path).unwrap_err();
        assert!(matches!(error, OwnError::Mode { .. }), "{error}");
        assert!(own_folder(&path).is_err());
    }
}

#[test]
fn an_own_folder_is_no_link_and_no_file() {
    let root = folder();
    let path = root.path().join("busway");
    assert!(own_folder(&path).unwrap().is_none());
    symlink(root.path(), &path).unwrap();
    for make in [true, false] {
        let error = match make {
            true => make_own_folder(&path).unwrap_err(),
            false => own_folder(&path).unwrap_err(),
        };
        assert!(matches!(error, OwnError::Kind { .. }), "{error}");
    }
    fs::remove_file(&path).unwrap();
    fs::write(&path, "").unwrap();
    let error = make_own_folder(&path).unwrap_err();
    assert!(matches!(error, OwnError::Kind { .. }), "{error}");
}

#[test]
fn an_own_file_is_closed_to_others_and_is_no_link() {
    let folder = folder();
    let path = folder.path().join("lock");
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    open_own(&path, &mut options).unwrap();
    assert_eq!(mode(&path), 0o600);
    set_mode(&path, 0o644);
    open_own(&path, &mut options).unwrap();
    assert_eq!(mode(&path), 0o600);
    set_mode(&path, 0o666);
    let error = open_own(&path, &mut options).unwrap_err();
    assert!(matches!(error, OwnError::Mode { mode: 0o666 }), "{error}");
    set_mode(&path, 0o600);
    let link = folder.path().join("link");
    symlink(&path, &link).unwrap();
    let hard = folder.path().join("hard");
    fs::hard_link(&path, &hard).unwrap();
    for path in [&link, &hard, &path] {
        let error = open_own(path, &mut options).unwrap_err();
        assert!(matches!(error, OwnError::Kind { .. }), "{error}");
    }
}

#[test]
fn what_is_somebody_elses_is_not_trusted() {
    let root = folder();
    let path = root.path().join("busway");
    make_own_folder(&path).unwrap();
    let file = path.join("lock");
    fs::write(&file, "").unwrap();
    if !is_root() {
        return;
    }
    give_to_nobody(&file);
    let error = open_own(&file, OpenOptions::new().read(true)).unwrap_err();
    assert!(
        matches!(error, OwnError::Owner { owner: NOBODY, .. }),
        "{error}"
    );
    give_to_nobody(&path);
    let error = make_own_folder(&path).unwrap_err();
    assert!(
        matches!(error, OwnError::Owner { owner: NOBODY, .. }),
        "{error}"
    );
    assert!(error.remedy(&path).contains("remove it as root"));
}

#[test]
fn another_user_can_neither_lock_nor_read_an_own_file() {
    let root = folder();
    set_mode(root.path(), 0o755);
    let path = root.path().join("busway");
    make_own_folder(&path).unwrap();
    let file = path.join("lock");
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    let lock = open_own(&file, &mut options).unwrap();
    let name = file.to_str().unwrap();
    for command in [
        &["flock", "-n", name, "true"][..],
        &["cat", name],
        &["ls", path.to_str().unwrap()],
    ] {
        let Some(succeeded) = as_nobody(command) else {
            return;
        };
        assert!(!succeeded, "{command:?}");
    }
    lock.try_lock().unwrap();
}

#[test]
fn a_node_is_given_away_by_itself_and_never_through_a_link() {
    let folder = folder();
    let victim = folder.path().join("victim");
    fs::write(&victim, "").unwrap();
    let link = folder.path().join("link");
    symlink("/dev/null", &link).unwrap();
    for (path, errno) in [(&link, libc::ELOOP), (&victim, libc::ENODEV)] {
        let error = open_node(path).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(errno), "{}", path.display());
    }
    open_node(Path::new("/dev/null")).unwrap();

    // A node of its own, with the numbers of /dev/null.
    let node = folder.path().join("12");
    let made = Command::new("mknod")
        .arg(&node)
        .args(["c", "1", "3"])
        .output();
    if !made.is_ok_and(|made| made.status.success()) {
        eprintln!("skipped: no node can be made here");
        return;
    }
    crate::sys::give_to(&open_node(&node).unwrap(), NOBODY).unwrap();
    assert_eq!(fs::metadata(&node).unwrap().uid(), NOBODY);
}
