"""Download one file with pip's own index, proxy, certificate and password settings.

Run as a script by `lightlib.fetch`, so that pip's modules stay out of the caller's process:
`python pip_download.py PROJECT FILENAME DESTINATION`. Prints the bytes written so far, a line at a time.
`pip download` itself would run the setup.py of a source archive; this only copies the file.
"""

import sys


def main(project: str, filename: str, destination: str) -> None:
    from pip._internal.commands import create_command

    command = create_command("download")
    options, _ = command.parse_args(["--quiet", "--no-cache-dir"])
    with command.main_context():
        session = command.get_default_session(options)
        finder = command._build_package_finder(options, session)
        links = [c.link for c in finder.find_all_candidates(project) if c.link.filename == filename]
        if not links:
            sys.exit(f"the package index has no {filename}")
        response = session.get(links[0].url, stream=True, headers={"Accept-Encoding": "identity"})
        response.raise_for_status()
        with open(destination, "wb") as file:
            for chunk in response.iter_content(1 << 20):
                file.write(chunk)
                print(file.tell(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
