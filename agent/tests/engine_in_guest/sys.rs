//! System calls by number, for what no program makes.
#![allow(unsafe_code)]

/// The first word of this program's command line when it is to make system calls in a container.
pub const CALL: &str = "syscall";

/// Makes each call, `NUMBER` or `NUMBER,ARGUMENT,ARGUMENT,ARGUMENT`, and prints what the kernel answers.
pub fn make_calls(calls: impl Iterator<Item = String>) {
    for call in calls {
        let mut words = call
            .split(',')
            .map(|word| word.parse::<libc::c_long>().expect("a number"));
        let number = words.next().expect("a number");
        let arguments: Vec<_> = words.chain([0; 3]).collect();
        let [first, second, third, ..] = arguments[..] else {
            unreachable!("three were added")
        };
        // SAFETY: the numbers are of calls that take no pointers, that are refused, or that do not exist.
        let answer = nix::errno::Errno::result(unsafe { libc::syscall(number, first, second, third) });
        println!(
            "{number} {}",
            answer.map_or_else(|error| error.to_string(), |value| format!("fine {value}"))
        );
    }
}
