//! System calls by number, for what no program makes.
#![allow(unsafe_code)]

/// The first word of this program's command line when it is to make system calls in a container.
pub const CALL: &str = "syscall";

/// Makes each call without arguments and prints what the kernel answers.
pub fn make_calls(numbers: impl Iterator<Item = String>) {
    for number in numbers {
        let number: libc::c_long = number.parse().expect("a number");
        // SAFETY: the numbers are of calls that take nothing, that are refused, or that do not exist.
        let answer = nix::errno::Errno::result(unsafe { libc::syscall(number) });
        println!(
            "{number} {}",
            answer.map_or_else(|error| error.to_string(), |_| "fine".to_owned())
        );
    }
}
