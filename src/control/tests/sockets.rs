//! Whose the socket is, and the client that looks for it.

use std::fs;
use std::os::fd::IntoRawFd as _;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use super::client::{ClientError, ask};
use super::*;

fn open(path: &Path) -> Result<Listening, SocketError> {
    Listening::open(&SocketAddress::Path(path.to_owned()))
}

fn refusal(path: &Path) -> String {
    open(path).unwrap_err().to_string()
}

/// Set in the process that has no umask.
const CHILD: &str = "BUSWAY_TEST_UMASK";

#[test]
fn the_socket_and_its_lock_are_the_users_alone_whatever_the_umask() {
    if std::env::var_os(CHILD).is_none() {
        let test = "control::tests::sockets::\
                    the_socket_and_its_lock_are_the_users_alone_whatever_the_umask";
        let output = Command::new("sh")
            .args(["-c", "umask 0; exec \"$0\" --exact \"$1\" --nocapture"])
            .arg(std::env::current_exe().unwrap())
            .arg(test)
            .env(CHILD, "1")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && said.contains("1 passed"),
            "{said}"
        );
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("api");
    let listening = open(&path).unwrap();
    for name in ["api", "api.lock"] {
        let mode = fs::metadata(folder.path().join(name)).unwrap().mode();
        assert_eq!(mode & 0o7777, 0o600, "{name}");
    }
    // It is known by its path, to `ss` and the like.
    let address = listening.listener().local_addr().unwrap();
    assert_eq!(address.as_pathname(), Some(&*path));
}

#[test]
fn a_live_socket_is_not_stolen_and_its_owner_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("api");
    let first = open(&path).unwrap();
    let said = refusal(&path);
    let owner = format!("a socket of process {} (", std::process::id());
    assert!(said.contains(&owner), "{said}");
    let lock = fs::read_to_string(folder.path().join("api.lock")).unwrap();
    assert_eq!(lock, format!("{}\n", std::process::id()));
    drop(first);
    // Nothing is left, and the place is free.
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    drop(open(&path).unwrap());
}

#[test]
fn a_socket_that_a_killed_process_left_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("api");
    drop(UnixListener::bind(&path).unwrap());
    fs::write(folder.path().join("api.lock"), "4194305\n").unwrap();
    let listening = open(&path).unwrap();
    UnixStream::connect(&path).unwrap();
    listening.listener().accept().unwrap();
}

#[test]
fn what_somebody_else_has_there_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("api");
    // Another program, which knows nothing of locks, with room for connections and without.
    let other = UnixListener::bind(&path).unwrap();
    assert!(refusal(&path).contains("another program"));
    UnixStream::connect(&path).unwrap();
    drop(other);
    fs::remove_file(&path).unwrap();
    fs::write(&path, "a file").unwrap();
    assert!(refusal(&path).contains("is there, and no socket: remove it"));
    assert_eq!(fs::read_to_string(&path).unwrap(), "a file");
    fs::remove_file(&path).unwrap();
    // A lock that leads elsewhere is neither followed nor written to.
    let victim = folder.path().join("victim");
    fs::write(&victim, "precious").unwrap();
    let lock = folder.path().join("api.lock");
    symlink(&victim, &lock).unwrap();
    assert!(refusal(&path).contains("a symbolic link"));
    fs::remove_file(&lock).unwrap();
    fs::hard_link(&victim, &lock).unwrap();
    assert!(refusal(&path).contains("several names"));
    assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
    fs::remove_file(&lock).unwrap();
    fs::create_dir(&lock).unwrap();
    assert!(refusal(&path).contains("api.lock"));
}

#[test]
fn a_place_for_no_socket_is_refused_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let said = refusal(&folder.path().join("no/api"));
    assert!(said.ends_with("; make the folder first"), "{said}");
    let said = refusal(&folder.path().join("x".repeat(108)));
    assert!(said.contains("107 bytes at most"), "{said}");
}

#[test]
fn a_socket_that_has_become_another_is_not_removed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("api");
    let listening = open(&path).unwrap();
    fs::remove_file(&path).unwrap();
    fs::write(&path, "somebody else's").unwrap();
    drop(listening);
    assert_eq!(fs::read_to_string(&path).unwrap(), "somebody else's");
}

#[test]
fn an_inherited_socket_is_served_and_left_where_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("api");
    let number = UnixListener::bind(&path).unwrap().into_raw_fd();
    let requests = Requests::new().unwrap();
    let address = SocketAddress::Fd(u32::try_from(number).unwrap());
    let server = Server::start(&address, requests.control()).unwrap();
    assert_eq!(Client::new(&path).ask("GET", "vmm.ping").status, 200);
    server.finish();
    assert!(path.exists());
    assert!(
        UnixStream::connect(&path).is_err(),
        "nobody listens any more"
    );
}

#[test]
fn a_descriptor_that_is_no_listening_socket_is_refused() {
    let refused = |number: i32| {
        let address = SocketAddress::Fd(u32::try_from(number).unwrap());
        Listening::open(&address).unwrap_err().to_string()
    };
    assert!(refused(1).contains("descriptor 1 is standard input, output or error"));
    assert!(refused(1_000_000).contains("not open"));
    let file = fs::File::open("/dev/null").unwrap().into_raw_fd();
    assert!(refused(file).contains("no socket"));
    let (one, _other) = UnixStream::pair().unwrap();
    assert!(refused(one.into_raw_fd()).contains("does not listen"));
}

#[test]
fn the_client_says_what_is_wrong_with_the_socket_and_what_helps() {
    let limit = Duration::from_millis(100);
    let vm = Vm::living();
    let asked = |path: &Path, method: &str, name: &str| ask(path, method, name, None, limit);
    let long = Duration::from_secs(10);
    assert_eq!(
        ask(&vm.socket, "PUT", "vm.pause", None, long).unwrap(),
        Value::Null
    );
    assert_eq!(
        ask(&vm.socket, "GET", "vm.info", None, long).unwrap()["state"],
        "Paused"
    );
    let again = ask(&vm.socket, "PUT", "vm.pause", None, long).unwrap_err();
    let refused = "The VM could not be paused: the guest is paused";
    assert!(again.to_string().ends_with(refused), "{again}");
    assert_eq!(again.exit_status(), RUNTIME);

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("api");
    let error = asked(&path, "GET", "vmm.ping").unwrap_err();
    assert!(matches!(error, ClientError::Absent(_)), "{error}");
    assert_eq!(error.exit_status(), USAGE);
    fs::write(&path, "").unwrap();
    let error = asked(&path, "GET", "vmm.ping").unwrap_err();
    assert!(matches!(error, ClientError::NoSocket(_)), "{error}");
    fs::remove_file(&path).unwrap();
    // It accepts connections, and says nothing.
    let mute = UnixListener::bind(&path).unwrap();
    let error = asked(&path, "GET", "vmm.ping").unwrap_err();
    assert!(matches!(error, ClientError::Silent { .. }), "{error}");
    drop(mute);
    let error = asked(&path, "GET", "vmm.ping").unwrap_err();
    assert!(matches!(error, ClientError::Dead(_)), "{error}");
    assert!(error.to_string().contains("takes its place"), "{error}");
}

#[test]
fn an_answer_that_is_none_is_told_from_silence() {
    for (answer, what) in [
        ("", "closes the connection unanswered"),
        ("SSH-2.0-x\r\n\r\n", "does not speak HTTP"),
        (
            "HTTP/1.1 200 \r\nContent-Length: x\r\n\r\n",
            "has no length",
        ),
        (
            "HTTP/1.1 200 \r\nContent-Length: 99999999\r\n\r\n",
            "too long",
        ),
        (
            "HTTP/1.1 200 \r\nContent-Length: 1\r\n\r\n{",
            "other than JSON",
        ),
        ("HTTP/1.1 500 \r\n\r\n", "HTTP status 500"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api");
        let listener = UnixListener::bind(&path).unwrap();
        let answering = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut some = [0; 1024];
            assert!(stream.read(&mut some).unwrap() > 0);
            stream.write_all(answer.as_bytes()).unwrap();
        });
        let error = ask(&path, "GET", "vm.info", None, Duration::from_secs(10)).unwrap_err();
        assert!(error.to_string().contains(what), "{error}");
        answering.join().unwrap();
    }
}

#[test]
fn a_socket_of_another_users_is_told_with_its_owner() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("api");
    let _socket = open(&path).unwrap();
    // Root is never refused, so that the refusal is made up.
    let refused = io::ErrorKind::PermissionDenied.into();
    let error = client::explain(&path, Duration::ZERO, refused);
    let owner = fs::metadata(&path).unwrap().uid();
    let said = format!("it belongs to user {owner}, and you are user {owner}");
    assert!(error.to_string().contains(&said), "{error}");
    assert_eq!(error.exit_status(), RUNTIME);
}
